"""What centering and scaling give, and where the norm matters."""

_base_ = './_base_/tasks.py'

two, three = [0, 1], [0, 1, 2]
cifar = dict(task='cifar_resnet8', lr_factor=10.0, seeds=three)
masks = dict(task='nuclei_masks', lr_factor=3.0, seeds=three)
gn = dict(type='GN', num_groups=16)
cells = [
    dict(cifar, norm=['GN+WS', 'BCN+WS']),
    *[
        {
            **cifar,
            'norm': 'BCN+WS variant',
            'norm_cfg': settings,
            'name': name,
            'seeds': two,
        }
        for name, settings in (
            ('BCN+WS, centering only', dict(scaling=False)),
            ('BCN+WS, scaling only', dict(centering=False)),
            ('BCN+WS, neither', dict(centering=False, scaling=False)),
        )
    ],
    dict(masks, norm=['GN+WS', 'BCN+WS']),
    *[
        {
            **masks,
            'norm': 'BCN+WS',
            'name': f'BCN+WS in the {where}, GN+WS elsewhere',
            'options': {f'model.{other}.norm_cfg': gn},
            'seeds': two,
        }
        for where, other in (
            ('backbone', 'decode_head'),
            ('head', 'backbone'),
        )
    ],
]
