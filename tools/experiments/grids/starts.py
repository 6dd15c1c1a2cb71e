"""Norms from a pretrained BN network, one image per step.

Every row at the rule's learning rate with seed 0. Those that are compared at
other rates, too, and at the best one with three seeds and with two images.
Metrics beside the task's: start/kept_eval and others, see StartHook. On a
slow core a run of voc_masks takes 10 minutes, one of person_instances 22.
"""

_base_ = './_base_/starts.py'

# The best rate of those that are compared, times the rule's, if not 1.
best = dict(
    voc_masks={
        'frozen BN, GN+WS in the heads': 0.3,
        'BN to BCN, eased in, GN+WS in the heads': 0.3,
    },
    person_instances={'frozen BN, GN+WS in the heads': 0.3},
)


def cell(task, name, lr_factor=1.0, **more):
    """A row of a task."""
    row = _base_.rows[name]
    return dict(row, task=task, name=name, lr_factor=lr_factor, **more)


cells = [
    *[cell('voc_masks', name) for name in _base_.rows],
    *[cell('person_instances', name) for name in _base_.fewer],
    *[cell('voc_masks', name, [0.3, 3.0]) for name in _base_.compared],
    *[cell('person_instances', name, [0.3, 3.0]) for name in _base_.compared],
    *[
        cell(task, name, rates.get(name, 1.0), **more)
        for task, rates in best.items()
        for name in _base_.compared
        for more in (dict(seeds=[1, 2]), dict(images=2))
    ],
    # Before the sweep.
    cell('person_instances', _base_.compared[0], seeds=[1]),
    # As many images, and as many steps, as the others have.
    dict(task='voc_masks', norm='BN', images=8, seeds=[0, 1, 2]),
    dict(task='voc_masks_long', norm='BN', images=8),
    dict(task='person_instances', norm='BN', images=8),
    *[
        dict(
            task='voc_masks_scratch',
            norm=norm,
            name=f'{norm}, from random weights',
            lr_factor=3.0,
        )
        for norm in ('GN+WS', 'BCN+WS')
    ],
]
