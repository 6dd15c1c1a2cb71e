"""ResNet-8 of 16 channels on CIFAR images in folders, one for each class."""

custom_imports = dict(
    imports=['experiments.classification', 'experiments.hooks'],
    allow_failed_imports=False,
)
custom_hooks = [dict(type='TrainModeGapHook'), dict(type='RecalibratedHook')]
data_root = 'data/cifar10_subset/'

model = dict(
    type='CifarResNet',
    blocks=1,
    width=16,
    conv_cfg=None,
    norm_cfg=dict(type='BN'),
)

train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='InfiniteSampler'),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ClassFolders', data_root=data_root + 'train', augment=True
    ),
)
val_dataloader = dict(
    batch_size=100,
    num_workers=0,
    # The folders are in the order of classes, of which a batch that norms
    # take statistics of should have more than one.
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='ClassFolders', data_root=data_root + 'test'),
)
val_evaluator = dict(type='Accuracy')

train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=10000, val_interval=10000
)
val_cfg = dict()
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.0005),
    clip_grad=dict(max_norm=10, norm_type=2),
)
default_scope = 'mmengine'
