# A narrow DGCNN on solids that the data set samples itself.
_base_ = './default_runtime.py'
custom_imports = dict(
    imports=['point_clouds.dgcnn', 'point_clouds.solids'],
    allow_failed_imports=False,
)
default_scope = 'mmengine'

model = dict(
    type='DGCNN',
    num_classes=14,
    k=10,
    channels=(32, 32, 64),
    embedding=128,
    hidden=(),
    norm_cfg=dict(type='BN'),
)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='InfiniteSampler'),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='Solids', length=4000, seed=0),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='Solids', length=700, seed=1),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='ClassAccuracy')
test_evaluator = val_evaluator

train_cfg = dict(type='IterBasedTrainLoop', max_iters=4000, val_interval=4000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='Adam', lr=0.0006),
    clip_grad=dict(max_norm=10, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=400),
    dict(
        type='CosineAnnealingLR',
        by_epoch=False,
        begin=400,
        end=4000,
        T_max=3600,
    ),
]
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=2000),
)
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(enable=False, base_batch_size=1)
