"""How fast BCN's estimates should move, at one image per step."""

_base_ = './_base_/tasks.py'

three = [0, 1, 2]
rows = [
    *[
        dict(norm_cfg=dict(momentum=rate), name=f'BCN+WS, rate {rate}')
        for rate in (0.003, 0.01, 0.03)
    ],
    {},  # 0.1
    dict(norm_cfg=dict(momentum=0.3), name='BCN+WS, rate 0.3'),
    *[
        dict(
            norm_cfg=dict(momentum=rate),
            name=f'BCN+WS, rate {rate}, {schedule}',
            hooks=[dict(type='UpdateRateHook', schedule=schedule)],
        )
        for rate, schedule in (
            (0.01, 'debiased'),
            (0.1, 'learning rate'),
            (0.1, 'both'),
        )
    ],
]
cells = [
    dict(row, task=task, norm='BCN+WS', lr_factor=factor, seeds=three)
    for task, factor in (('nuclei_masks', 3.0), ('cifar_resnet8', 10.0))
    for row in rows
] + [
    dict(row, task='nuclei_instances', norm='BCN+WS', lr_factor=factor)
    for row in rows
    if row.get('name') in (None, 'BCN+WS, rate 0.01, debiased')
    for factor in (1.0, 3.0)
]
