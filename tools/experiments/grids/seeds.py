"""Spreads over eight seeds, of the last weights and of their mean.

Seeds, data order and learning rates are paired. Then BN with 16 images and as
many steps as the others have of one.
"""

_base_ = './_base_/tasks.py'

hooks = [dict(type='AveragedHook')]
cells = [
    dict(
        task='nuclei_masks',
        norm=['GN+WS', 'BCN+WS'],
        lr_factor=3.0,
        seeds=[3, 4, 5, 7, 8],
        hooks=hooks,
    ),
    # Those of batch.py.
    dict(
        task='nuclei_masks',
        norm=['GN+WS', 'BCN+WS'],
        lr_factor=3.0,
        seeds=[0, 1, 2],
    ),
    # The seed that falls, with a third of the rate.
    dict(task='nuclei_masks', norm='GN+WS', seeds=[7], hooks=hooks),
    dict(
        task='nuclei_masks_long', norm='BN', images=16, seeds=[3], hooks=hooks
    ),
    dict(
        task='cifar_resnet8_long',
        norm='BN',
        images=16,
        lr_factor=3.0,
        seeds=[3],
        hooks=hooks,
    ),
]
