"""Norms for point clouds and for video, at 1, 2 and 16 samples per step.

Adam, for clouds, follows the square root of the batch rather than the batch.
"""

_base_ = './_base_/tasks.py'

brief = dict(at=16, metric='accuracy', validations=1)
tasks = dict(
    solids=dict(
        brief,
        images=4000,
        config='configs/dgcnn/dgcnn_k10_gn-ws-all_1xb1-4k_solids.py',
        lr=0.001,
    ),
    motions=dict(
        brief,
        images=2000,
        config='configs/tsm/tsm_r18_gn-ws-all_1xb1-4k_motions.py',
        lr=0.1,
    ),
)
cells = [
    dict(
        task=task,
        norm=['BN', 'GN+WS', 'BCN+WS'],
        images=images,
        lr_factor=factor,
        seeds=[0, 1, 2],
    )
    for task, factors in (('solids', (10, 7, 3)), ('motions', (1.5, 1, 1)))
    for images, factor in zip((1, 2, 16), factors, strict=True)
]
