"""How near to elimination the channels are, and how the gradient turns."""

_base_ = './_base_/tasks.py'

measure = dict(
    custom_hooks=[
        dict(type='StopWhenDiverged'),
        dict(type='SmoothnessHook', interval=500),
        dict(type='ws_mm.SingularitiesHook', interval=1000, num_batches=2),
    ]
)
vgg = dict(task='cifar_vgg6', seeds=[0, 1, 2])
cells = [
    dict(vgg, norm='GN', options=measure),
    dict(
        vgg,
        norm=['GN+WS', 'BCN', 'BCN+WS'],
        lr_factor=10.0,
        options=measure,
    ),
    dict(
        vgg,
        norm='BN',
        images=16,
        options=dict(
            custom_hooks=[
                dict(type='StopWhenDiverged'),
                dict(type='SmoothnessHook', interval=31),
                dict(
                    type='ws_mm.SingularitiesHook', interval=62, num_batches=2
                ),
            ]
        ),
    ),
]
