"""Norms from a pretrained BN network: three seeds, two images, BN at 8.

The rates are to be the best of starts.py: read its table
(report.py OUT_DIR --grid starts.py) and write them into ``best``. In the same
OUT_DIR the runs of seed 0 are there already; the others take 4.5 hours on
one core.
"""

_base_ = './_base_/starts.py'

# Times the rate of the rule; 1.0 for a row that is not named.
best = dict(voc_masks={}, person_instances={})
# Those of which something is concluded.
compared = [
    'frozen BN, GN+WS in the heads',
    'frozen BN, BCN+WS in the heads',
    'BN to GN+WS',
    'BN to BCN',
    'BN to BCN+WS',
    'BN to BCN, eased in, learned',
]


def cell(task, name, **more):
    """A row at its best rate."""
    rate = best[task].get(name, 1.0)
    return dict(
        _base_.rows[name], task=task, name=name, lr_factor=rate, **more
    )


cells = [
    *[cell(task, name, seeds=[0, 1, 2]) for task in best for name in compared],
    *[cell('voc_masks', name, images=2) for name in _base_.fewer],
    *[cell('person_instances', name, images=2) for name in compared[:3]],
    # As many images, and as many steps, as the others have.
    dict(task='voc_masks', norm='BN', images=8, seeds=[0, 1, 2]),
    dict(task='voc_masks_long', norm='BN', images=8),
    dict(task='person_instances', norm='BN', images=8),
]
