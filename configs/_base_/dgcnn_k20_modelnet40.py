# The model and the training of the WS authors, who have a transformer of the
# points before it.
_base_ = './default_runtime.py'
custom_imports = dict(
    imports=['point_clouds.dgcnn', 'point_clouds.modelnet'],
    allow_failed_imports=False,
)
default_scope = 'mmengine'
data_root = 'data/modelnet40_ply_hdf5_2048'

model = dict(type='DGCNN', num_classes=40, label_smoothing=0.2)
clouds = dict(type='ModelNetH5', data_root=data_root)
train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(clouds, split='train', augment=True),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(clouds, split='test'),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='ClassAccuracy')
test_evaluator = val_evaluator

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=250, val_interval=10)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='Adam', lr=0.001)
)
param_scheduler = [  # about every 200,000 clouds
    dict(type='StepLR', by_epoch=True, end=250, step_size=20, gamma=0.7)
]
auto_scale_lr = dict(enable=False, base_batch_size=32)
