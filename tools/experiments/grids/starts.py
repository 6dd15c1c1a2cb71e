"""Norms from a pretrained BN network, one image per step, at three rates.

Seed 0 alone: it chooses the learning rate of each row. Then
starts_seeds.py. Metrics beside the task's: start/kept_eval and others, see
StartHook. On one core a run of voc_masks takes 6 minutes, one of
person_instances 7; all of these 9.5 hours.
"""

_base_ = './_base_/starts.py'

factors = [0.3, 1.0, 3.0]
one = dict(seeds=[0], lr_factor=factors)
from_scratch = ('GN+WS', 'BCN+WS')
cells = [
    *[
        dict(one, **row, task='voc_masks', name=name)
        for name, row in _base_.rows.items()
    ],
    *[
        dict(one, **_base_.rows[name], task='person_instances', name=name)
        for name in _base_.fewer
    ],
    dict(task='voc_masks', norm='BN', images=8, lr_factor=[0.3, 1.0]),
    *[
        dict(
            task='voc_masks_scratch',
            norm=norm,
            name=f'{norm}, from random weights',
            lr_factor=[1.0, 3.0],
        )
        for norm in from_scratch
    ],
]
