"""How fast BCN's estimates should move, at one image per step."""

_base_ = './_base_/tasks.py'

three, two = [0, 1, 2], [0, 1]


def rate(value):
    """A constant rate other than 0.01."""
    return dict(norm_cfg=dict(momentum=value), name=f'BCN+WS, rate {value}')


def scheduled(value, schedule):
    """A rate that slows down from ``value``."""
    return dict(
        norm_cfg=dict(momentum=value),
        name=f'BCN+WS, rate {value}, {schedule}',
        hooks=[dict(type='UpdateRateHook', schedule=schedule)],
    )


debiased = dict(
    name='BCN+WS, debiased',
    hooks=[dict(type='UpdateRateHook', schedule='debiased')],
)
cells = [
    dict(row, task=task, norm='BCN+WS', lr_factor=factor, seeds=three)
    for task, factor in (('nuclei_masks', 3.0), ('cifar_resnet8', 10.0))
    for row in (
        rate(0.003),
        {},  # 0.01
        rate(0.03),
        rate(0.1),
        rate(0.3),
        debiased,
        scheduled(0.1, 'learning rate'),
        scheduled(0.1, 'both'),
    )
] + [
    dict(row, task='nuclei_instances', norm='BCN+WS', seeds=two)
    for row in ({}, rate(0.1), debiased)
]
