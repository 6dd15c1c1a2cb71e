# Images of CIFAR-10 in folders train/CLASS and test/CLASS, enlarged to 64x64
# for five halvings.
_base_ = './cifar10.py'
load = dict(type='LoadImageFromFile')
enlarge = [dict(type='Resize', scale=64), dict(type='PackInputs')]
data = dict(
    _delete_=True, type='CustomDataset', data_root='data/cifar10_subset/'
)
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **data,
        data_prefix='train',
        pipeline=[
            load,
            *_base_.train_dataloader.dataset.pipeline[:-1],
            *enlarge,
        ],
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**data, data_prefix='test', pipeline=[load, *enlarge]),
)
test_dataloader = val_dataloader
