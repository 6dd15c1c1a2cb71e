# GN and WS. No published row: the papers name this data without a figure of
# it that we could read.
_base_ = '../_base_/default_runtime.py'
custom_imports = dict(
    imports=['video.tsm', 'video.something'], allow_failed_imports=False
)
default_scope = 'mmpretrain'
data_root = 'data/sthv2/'

model = dict(
    type='TSM',
    num_classes=174,
    channels=2048,
    backbone=dict(
        type='ResNet',
        depth=50,
        norm_eval=False,
        conv_cfg=dict(type='ws_mm.WSConv2d'),
        norm_cfg=dict(type='GN', num_groups=32),
        init_cfg=dict(
            type='Pretrained', checkpoint='open-mmlab://jhu/resnet50_gn_ws'
        ),
    ),
)
clips = dict(
    type='SomethingSomething',
    data_root=data_root,
    labels='something-something-v2-labels.json',
    data_prefix=dict(video='20bn-something-something-v2'),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        clips, ann_file='something-something-v2-train.json', augment=True
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=8,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(clips, ann_file='something-something-v2-validation.json'),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='ClassAccuracy')
test_evaluator = val_evaluator

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=50, val_interval=5)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0005),
    clip_grad=dict(max_norm=20, norm_type=2),
)
param_scheduler = [
    dict(type='MultiStepLR', by_epoch=True, end=50, milestones=[20, 40])
]
auto_scale_lr = dict(enable=False, base_batch_size=64)
