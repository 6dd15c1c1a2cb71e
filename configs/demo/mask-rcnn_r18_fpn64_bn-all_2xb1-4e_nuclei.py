# BN over the one image of a process. No published row: a model for a CPU.
_base_ = [
    '../_base_/models/mask-rcnn_r18_fpn64.py',
    '../_base_/datasets/nuclei_instance.py',
    '../_base_/schedules/nuclei_4e.py',
    '../_base_/runtime_det.py',
]

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
