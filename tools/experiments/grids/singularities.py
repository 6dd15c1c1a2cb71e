"""How near to elimination the channels are, and how the gradient turns."""

_base_ = './_base_/tasks.py'


def measured(interval):
    """Hooks that measure a few tens of times in a run."""
    return [
        dict(type='SmoothnessHook', interval=interval),
        dict(
            type='ws_mm.SingularitiesHook',
            interval=2 * interval,
            num_batches=2,
        ),
    ]


vgg = dict(task='cifar_vgg6', seeds=[0, 1, 2])
each = dict(vgg, hooks=measured(500))
slow = dict(
    each,
    norm_cfg=dict(momentum=0.01),
    hooks=[
        *measured(500),
        dict(type='UpdateRateHook', schedule='debiased'),
    ],
)
cells = [
    dict(each, norm='GN'),
    dict(each, norm='GN+WS', lr_factor=10.0),
    *[
        dict(
            slow,
            norm=norm,
            lr_factor=10.0,
            name=f'{norm}, rate 0.01, debiased',
        )
        for norm in ('BCN', 'BCN+WS')
    ],
    dict(vgg, norm='BN', images=16, hooks=measured(31)),
]
