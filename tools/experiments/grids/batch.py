"""Which norm at which batch: every run of a task sees the same images.

The learning rates are the best of learning_rate.py, times the linear rule's.
"""

_base_ = './_base_/tasks.py'

three, two = [0, 1, 2], [0, 1]
cifar = dict(task='cifar_resnet8', seeds=three)
masks = dict(task='nuclei_masks', seeds=three)
instances = dict(task='nuclei_instances', seeds=two)
fast = dict(
    norm='BCN+WS', norm_cfg=dict(momentum=0.1), name='BCN+WS, rate 0.1'
)
cells = [
    dict(cifar, norm='BN', images=[1, 16], lr_factor=3.0),
    dict(cifar, norm='GN'),
    dict(cifar, norm=['GN+WS', 'BCN+WS'], lr_factor=10.0),
    dict(cifar, **fast, lr_factor=10.0),
    dict(cifar, norm=['GN+WS', 'BCN+WS'], images=16, lr_factor=3.0),
    dict(cifar, **fast, images=16, lr_factor=3.0),
    dict(cifar, norm='BCN+WS batch', images=16, lr_factor=10.0),
    dict(masks, norm=['BN', 'GN']),
    dict(masks, norm=['GN+WS', 'BCN+WS'], lr_factor=3.0),
    # Those of seeds.py.
    dict(
        masks,
        norm=['GN+WS', 'BCN+WS'],
        lr_factor=3.0,
        seeds=[3, 4, 5, 7, 8],
        hooks=[dict(type='AveragedHook')],
    ),
    dict(masks, **fast, lr_factor=3.0),
    # The head pools one image to one value per channel: no BN can do that.
    dict(
        masks,
        norm='BN',
        name='BN in the backbone, GN in the head',
        options={'model.decode_head.norm_cfg': dict(type='GN', num_groups=16)},
    ),
    dict(masks, norm='BN', images=16),
    dict(instances, norm=['GN', 'GN+WS']),
    dict(instances, **fast),
    dict(
        instances,
        norm='BCN+WS',
        name='BCN+WS, debiased',
        hooks=[dict(type='UpdateRateHook', schedule='debiased')],
    ),
    dict(instances, norm='BN'),
    dict(cifar, norm='frozen BN', seeds=two),
    dict(cifar, norm=['BCN', 'BN+WS'], lr_factor=10.0, seeds=two),
    dict(cifar, norm='BN', images=[2, 4], lr_factor=3.0, seeds=two),
    dict(
        cifar,
        norm=['BN', 'GN+WS'],
        accumulation=16,
        lr_factor=3.0,
        seeds=two,
    ),
    dict(cifar, **fast, accumulation=16, lr_factor=3.0, seeds=two),
]
