"""Norms from a pretrained BN network, one image per step, at some rates.

Seed 0 alone: it chooses the learning rate of each row, for starts_seeds.py.
Metrics beside the task's: start/kept_eval and others, see StartHook. On one
core a run of voc_masks takes 5 to 6 minutes of CPU time, one of
person_instances 8 to 9; all of these take 9 hours.
"""

_base_ = './_base_/starts.py'

from_scratch = ('GN+WS', 'BCN+WS')
cells = [
    *[
        dict(row, task='voc_masks', name=name, lr_factor=[0.3, 1.0, 3.0])
        for name, row in _base_.rows.items()
    ],
    *[
        dict(
            _base_.rows[name],
            task='person_instances',
            name=name,
            lr_factor=[1.0, 3.0],
        )
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
