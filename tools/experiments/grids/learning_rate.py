"""Which learning rate suits each norm: times that of the linear rule."""

_base_ = './_base_/tasks.py'

factors = [1.0, 3.0, 10.0]
cells = [
    dict(
        task='cifar_resnet8',
        norm=['BN', 'GN', 'GN+WS', 'BCN+WS'],
        lr_factor=[*factors, 30.0],
        seeds=[0],
    ),
    dict(
        task='cifar_resnet8',
        norm='BN',
        images=16,
        lr_factor=factors,
        seeds=[0],
    ),
    dict(
        task='cifar_resnet8',
        norm=['GN+WS', 'BCN+WS', 'BCN+WS batch'],
        images=16,
        lr_factor=[3.0, 10.0],
        seeds=[0],
    ),
    dict(task='cifar_resnet8', norm='BCN', lr_factor=factors, seeds=[0]),
    dict(
        task='nuclei_masks',
        norm=['GN', 'GN+WS', 'BCN+WS'],
        lr_factor=[1.0, 3.0],
        seeds=[0],
    ),
    dict(
        task='nuclei_masks',
        norm=['GN+WS', 'BCN+WS'],
        lr_factor=10.0,
        seeds=[0],
    ),
    dict(
        task='nuclei_instances',
        norm=['GN+WS', 'BCN+WS'],
        lr_factor=[1.0, 3.0],
        seeds=[0],
    ),
]
