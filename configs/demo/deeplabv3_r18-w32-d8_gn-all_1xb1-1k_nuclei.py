# GN. No published row: a model for a CPU.
_base_ = [
    '../_base_/models/deeplabv3_r18-w32-d8.py',
    '../_base_/datasets/nuclei_semantic.py',
    '../_base_/schedules/nuclei_1k.py',
]

norm_cfg = dict(type='GN', num_groups=16, requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg),
)
