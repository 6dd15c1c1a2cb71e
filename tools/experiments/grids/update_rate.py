"""How fast BCN's estimates should move, at one image per step."""

_base_ = './_base_/tasks.py'

own = dict(
    task='cifar_resnet8', norm='BCN+WS', lr_factor=10.0, seeds=[0, 1, 2]
)
cells = [
    *[
        dict(own, norm_cfg=dict(momentum=rate), name=f'BCN+WS, rate {rate}')
        for rate in (0.003, 0.01, 0.03)
    ],
    own,  # 0.1
    dict(own, norm_cfg=dict(momentum=0.3), name='BCN+WS, rate 0.3'),
    *[
        dict(
            own,
            norm_cfg=dict(momentum=rate),
            name=f'BCN+WS, rate {rate}, {schedule}',
            options=dict(
                custom_hooks=[
                    dict(type='StopWhenDiverged'),
                    dict(type='TrainModeGapHook'),
                    dict(type='UpdateRateHook', schedule=schedule),
                ]
            ),
        )
        for rate, schedule in ((0.01, 'debiased'), (0.1, 'learning rate'))
    ],
]
