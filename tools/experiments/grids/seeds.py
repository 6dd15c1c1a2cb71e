"""Spreads over eight seeds, of the last weights and of their mean.

Seeds, data order and learning rates are paired. With the long tasks BN takes
as many steps of 16 images as the others of one.
"""

_base_ = './_base_/tasks.py'

eight, three = list(range(3, 11)), [3, 4, 5]
hooks = [dict(type='AveragedHook')]
masks = dict(task='nuclei_masks', seeds=eight, hooks=hooks)
photographs = dict(task='cifar_resnet8', seeds=eight, hooks=hooks)
cells = [
    dict(masks, norm=['GN+WS', 'BCN+WS'], lr_factor=3.0),
    dict(masks, norm='GN'),
    dict(masks, norm=['GN+WS', 'BCN+WS']),
    dict(photographs, norm=['GN+WS', 'BCN+WS', 'MABN'], lr_factor=10.0),
    dict(photographs, norm='GN'),
    dict(photographs, norm='BN', images=16, lr_factor=3.0),
    dict(
        task='cifar_resnet8_long',
        norm='BN',
        images=16,
        lr_factor=3.0,
        seeds=three,
        hooks=hooks,
    ),
    dict(
        task='nuclei_masks_long',
        norm='BN',
        images=16,
        seeds=three,
        hooks=hooks,
    ),
]
