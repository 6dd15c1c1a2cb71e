"""Which norm at which batch: every run of a task sees the same images."""

_base_ = './_base_/tasks.py'

seeds = [0, 1, 2]
cells = [
    dict(
        task='cifar_resnet8',
        norm=['BN', 'GN', 'GN+WS', 'BCN+WS'],
        images=1,
        seeds=seeds,
    ),
    dict(
        task='cifar_resnet8',
        norm=['BN', 'GN+WS', 'BCN+WS', 'BCN+WS batch'],
        images=16,
        seeds=seeds,
    ),
    dict(
        task='nuclei_masks',
        norm=['BN', 'GN', 'GN+WS', 'BCN+WS'],
        seeds=seeds,
    ),
    # The head pools one image to one value per channel: no BN can do that.
    *[
        dict(
            task='nuclei_masks',
            norm='BN',
            name='BN in the backbone, GN in the head',
            images=images,
            seeds=seeds,
            options={
                'model.decode_head.norm_cfg': dict(type='GN', num_groups=16)
            },
        )
        for images in (1, 16)
    ],
    dict(task='nuclei_masks', norm='BN', images=16, seeds=seeds),
    dict(
        task='nuclei_instances',
        norm=['BN', 'GN', 'GN+WS', 'BCN+WS'],
        seeds=seeds,
    ),
    dict(task='nuclei_instances', norm='BN', images=16, seeds=seeds),
    dict(
        task='cifar_resnet8',
        norm=['frozen BN', 'BN+WS', 'BCN'],
        images=1,
        seeds=seeds,
    ),
    dict(
        task='cifar_resnet8',
        norm=['BN', 'GN+WS', 'BCN+WS'],
        images=[2, 4],
        seeds=seeds,
    ),
]
