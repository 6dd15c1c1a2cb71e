"""Norms for point clouds and for video, at small batches and at 16."""

_base_ = './_base_/tasks.py'

brief = dict(images=4000, lr=0.1, at=16, metric='accuracy', validations=1)
tasks = dict(
    solids=dict(
        brief, config='configs/dgcnn/dgcnn_k10_gn-ws-all_1xb1-4k_solids.py'
    ),
    motions=dict(
        brief, config='configs/tsm/tsm_r18_gn-ws-all_1xb1-4k_motions.py'
    ),
)
cells = [
    dict(task=task, norm=norm, images=batch, seeds=[0, 1, 2])
    for task in ('solids', 'motions')
    for batch in (1, 2, 16)
    for norm in ('BN', 'GN+WS', 'BCN+WS')
]
