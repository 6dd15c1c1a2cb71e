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
cells = [
    dict(each, norm='GN'),
    dict(each, norm=['GN+WS', 'BCN', 'BCN+WS'], lr_factor=10.0),
    # At one rate, too: distances and turns depend on it.
    dict(each, norm='GN', lr_factor=10.0, seeds=[0, 1]),
    dict(each, norm=['GN+WS', 'BCN+WS'], seeds=[0, 1]),
    dict(vgg, norm='BN', images=16, hooks=measured(31)),
]
