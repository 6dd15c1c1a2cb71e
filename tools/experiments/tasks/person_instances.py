"""Mask R-CNN of 64 channels on photographs of persons, on pretrained Lite0."""

_base_ = [
    '../../../configs/_base_/models/mask-rcnn_r18_fpn64.py',
    '../../../configs/_base_/runtime_det.py',
]

custom_imports = dict(
    imports=['experiments.hooks', 'experiments.starts'],
    allow_failed_imports=False,
)
norm_cfg = dict(type='BN')
pretrained = dict(type='PretrainedLite0')
custom_hooks = [
    dict(type='StartHook', reference=dict(type='Lite0', init_cfg=pretrained))
]

data_root = 'data/coco_person_half/'
metainfo = dict(classes=('person',), palette=[(220, 20, 60)])
model = dict(
    data_preprocessor=dict(
        mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]
    ),
    backbone=dict(
        _delete_=True,
        type='Lite0',
        conv_cfg=None,
        norm_cfg=norm_cfg,
        init_cfg=pretrained,
    ),
    neck=dict(
        in_channels=[24, 40, 112, 320], conv_cfg=None, norm_cfg=norm_cfg
    ),
    roi_head=dict(
        bbox_head=dict(conv_cfg=None, norm_cfg=norm_cfg),
        mask_head=dict(conv_cfg=None, norm_cfg=norm_cfg),
    ),
)

resize = dict(type='Resize', scale=(256, 256), keep_ratio=True)
load = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
]
train_pipeline = [
    *load,
    dict(
        type='RandomResize',
        scale=(256, 256),
        ratio_range=(0.75, 1.25),
        keep_ratio=True,
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    *load,
    resize,  # behind the annotations: their loss is measured
    dict(
        type='PackDetInputs',
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
        ),
    ),
]
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=16),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(
    type='CocoMetric',
    ann_file=data_root + 'annotations/instances_val.json',
    metric=['bbox', 'segm'],
)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=825, val_interval=825)
val_cfg = dict(type='ValLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0001),
    clip_grad=dict(max_norm=10, norm_type=2),
)
