"""Which norm at which batch: every run of a task sees the same images.

The learning rates are the best of learning_rate.py, times the linear rule's.
"""

_base_ = './_base_/tasks.py'

three, two = [0, 1, 2], [0, 1]
cifar = dict(task='cifar_resnet8', seeds=three)
masks = dict(task='nuclei_masks', seeds=three)
instances = dict(task='nuclei_instances', seeds=three)
cells = [
    dict(cifar, norm='BN', images=[1, 16], lr_factor=3.0),
    dict(cifar, norm='GN'),
    dict(cifar, norm=['GN+WS', 'BCN+WS'], lr_factor=10.0),
    dict(cifar, norm=['GN+WS', 'BCN+WS'], images=16, lr_factor=3.0),
    dict(cifar, norm='BCN+WS batch', images=16, lr_factor=10.0),
    dict(masks, norm=['BN', 'GN']),
    dict(masks, norm=['GN+WS', 'BCN+WS'], lr_factor=3.0),
    # The head pools one image to one value per channel: no BN can do that.
    dict(
        masks,
        norm='BN',
        name='BN in the backbone, GN in the head',
        options={'model.decode_head.norm_cfg': dict(type='GN', num_groups=16)},
    ),
    dict(masks, norm='BN', images=16),
    dict(instances, norm=['GN', 'GN+WS', 'BCN+WS']),
    dict(instances, norm='BN', images=[1, 16], seeds=two),
    dict(cifar, norm='frozen BN', seeds=two),
    dict(cifar, norm=['BCN', 'BN+WS'], lr_factor=10.0, seeds=two),
    dict(cifar, norm='BN', images=[2, 4], lr_factor=3.0, seeds=two),
    dict(
        cifar,
        norm=['BN', 'GN+WS', 'BCN+WS'],
        accumulation=16,
        lr_factor=3.0,
        seeds=two,
    ),
    # Not swept: between what suits one image and what suits 16.
    *[
        dict(
            cifar,
            norm=['GN+WS', 'BCN+WS'],
            images=images,
            lr_factor=factor,
            seeds=two,
        )
        for images, factor in ((2, 10.0), (4, 5.0))
    ],
]
