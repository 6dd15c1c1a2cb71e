"""Which learning rate suits each norm: times that of the linear rule.

And, for instances, whether a longer warm-up helps BCN.
"""

_base_ = './_base_/tasks.py'

factors = [1.0, 3.0, 10.0]


def fast(norm):
    """A norm whose estimates move at the rate of BatchNorm."""
    return dict(
        norm=norm, norm_cfg=dict(momentum=0.1), name=f'{norm}, rate 0.1'
    )


cifar = dict(task='cifar_resnet8', seeds=[0])
masks = dict(task='nuclei_masks', seeds=[0])
instances = dict(task='nuclei_instances', seeds=[0], lr_factor=[1.0, 3.0])
cells = [
    dict(cifar, norm=['BN', 'GN', 'GN+WS'], lr_factor=[*factors, 30.0]),
    dict(cifar, **fast('BCN+WS'), lr_factor=[*factors, 30.0]),
    dict(cifar, norm='BN', images=16, lr_factor=factors),
    dict(
        cifar,
        norm=['GN+WS', 'BCN+WS batch'],
        images=16,
        lr_factor=[3.0, 10.0],
    ),
    dict(cifar, **fast('BCN+WS'), images=16, lr_factor=[3.0, 10.0]),
    dict(cifar, **fast('BCN'), lr_factor=[1.0, 3.0]),
    dict(masks, norm=['GN', 'GN+WS'], lr_factor=[1.0, 3.0]),
    dict(masks, norm='GN+WS', lr_factor=10.0),
    dict(masks, **fast('BCN+WS'), lr_factor=factors),
    dict(masks, norm='BN', images=16, lr_factor=[0.3, 1.0]),
    dict(instances, norm='GN+WS'),
    dict(
        instances,
        norm='BCN+WS',
        name='BCN+WS, debiased',
        hooks=[dict(type='UpdateRateHook', schedule='debiased')],
    ),
    {
        **instances,
        **fast('BCN+WS'),
        'name': 'BCN+WS, rate 0.1, warm-up over half',
        'lr_factor': 1.0,
        'options': {
            'param_scheduler.0.end': 446,
            'param_scheduler.1.begin': 446,
            'param_scheduler.1.T_max': 446,
        },
    },
]
