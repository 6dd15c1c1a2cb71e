"""How fast BCN's estimates should move, at one image per step."""

_base_ = './_base_/tasks.py'

seeds = [0, 1]
rates = [0.003, 0.01, 0.03, 0.1, 0.3]
cells = [
    *[
        dict(
            task='cifar_resnet8',
            norm='BCN+WS',
            norm_cfg=dict(momentum=rate),
            name=f'{rate}',
            seeds=seeds,
        )
        for rate in rates
    ],
    *[
        dict(
            task='cifar_resnet8',
            norm='BCN+WS',
            norm_cfg=dict(momentum=rate),
            name=f'{rate}, {schedule}',
            seeds=seeds,
            options=dict(
                custom_hooks=[
                    dict(type='StopWhenDiverged'),
                    dict(type='UpdateRateHook', schedule=schedule),
                ]
            ),
        )
        for rate, schedule in ((0.01, 'debiased'), (0.1, 'learning rate'))
    ],
]
