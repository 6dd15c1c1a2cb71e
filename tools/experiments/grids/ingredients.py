"""Grid: centering and scaling one by one, and places of the norm."""

_base_ = './_base_/tasks.py'

two, three = [0, 1], [0, 1, 2]
cifar = dict(task='cifar_resnet8', lr_factor=10.0, seeds=three)
masks = dict(task='nuclei_masks', lr_factor=3.0, seeds=three)
instances = dict(task='nuclei_instances', seeds=[0])
heads = ['roi_head.bbox_head', 'roi_head.mask_head']
debiased = dict(type='UpdateRateHook', schedule='debiased')


def placed(where, elsewhere):
    """BCN+WS in one place, GN+WS in the others."""
    gn = dict(_delete_=True, type='GN', num_groups=16)
    return dict(
        norm='BCN+WS',
        name=f'BCN+WS in the {where}, GN+WS elsewhere',
        options={f'model.{part}.norm_cfg': gn for part in elsewhere},
    )


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
        {**masks, **placed(where, elsewhere), 'seeds': two}
        for where, elsewhere in (
            ('backbone', ['decode_head']),
            ('head', ['backbone']),
        )
    ],
    dict(instances, norm='GN+WS'),
    dict(instances, norm='BCN+WS', name='BCN+WS, debiased', hooks=[debiased]),
    *[
        {**instances, **placed(where, elsewhere), 'hooks': [debiased]}
        for where, elsewhere in (
            ('backbone', ['neck', *heads]),
            ('neck', ['backbone', *heads]),
            ('heads', ['backbone', 'neck']),
        )
    ],
]
