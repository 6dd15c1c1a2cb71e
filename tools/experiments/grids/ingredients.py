"""What centering and scaling give, and where the norm matters."""

_base_ = './_base_/tasks.py'

gn = dict(type='GN', num_groups=16)
cells = [
    *[
        dict(
            task='cifar_resnet8',
            norm='BCN+WS variant',
            norm_cfg=settings,
            name=name,
            seeds=[0, 1, 2],
        )
        for name, settings in (
            ('centering only', dict(scaling=False)),
            ('scaling only', dict(centering=False)),
            ('neither', dict(centering=False, scaling=False)),
        )
    ],
    *[
        dict(
            task='nuclei_masks',
            norm='BCN+WS',
            name=f'BCN+WS in the {where}, GN+WS elsewhere',
            options={f'model.{other}.norm_cfg': gn},
            seeds=[0, 1, 2],
        )
        for where, other in (
            ('backbone', 'decode_head'),
            ('head', 'backbone'),
        )
    ],
]
