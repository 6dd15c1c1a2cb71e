"""DeepLabV3 with a Lite head on VOC photographs, on pretrained Lite0.

Six classes and the background; of the others there are at most 18 images to
validate with, and their pixels are ignored.
"""

_base_ = '../../../configs/_base_/runtime_seg.py'

custom_imports = dict(
    imports=[
        'experiments.hooks',
        'experiments.photographs',
        'experiments.starts',
    ],
    allow_failed_imports=False,
)
norm_cfg = dict(type='BN')
pretrained = dict(type='PretrainedLite0')
custom_hooks = [
    dict(type='StartHook', reference=dict(type='Lite0', init_cfg=pretrained))
]

data_root = 'data/voc2012_half/'
metainfo = dict(
    classes=('background', 'cat', 'cow', 'dog', 'horse', 'person', 'sheep')
)
crop_size = (224, 224)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
    ),
    backbone=dict(
        type='Lite0',
        conv_cfg=None,
        norm_cfg=norm_cfg,
        init_cfg=pretrained,
    ),
    decode_head=dict(
        type='LiteASPPHead',
        # All three in the size of the first: stride 8.
        in_channels=[40, 112, 320],
        in_index=[1, 2, 3],
        input_transform='resize_concat',
        channels=64,
        dilations=(1, 3, 6),
        dropout_ratio=0.1,
        num_classes=7,
        conv_cfg=None,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomResize',
        scale=(250, 250),
        ratio_range=(0.75, 1.5),
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='VOCFolders',
    data_root=data_root,
    metainfo=metainfo,
    img_suffix='.jpg',
    seg_map_suffix='.png',
    reduce_zero_label=False,
)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='img/train', seg_map_path='mask/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='img/val', seg_map_path='mask/val'),
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])

train_cfg = dict(type='IterBasedTrainLoop', max_iters=1100, val_interval=1100)
val_cfg = dict(type='ValLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.001, momentum=0.9, weight_decay=0.0005),
    # The head is new, the backbone is not.
    paramwise_cfg=dict(custom_keys={'decode_head': dict(lr_mult=50)}),
    clip_grad=dict(max_norm=10, norm_type=2),
)
