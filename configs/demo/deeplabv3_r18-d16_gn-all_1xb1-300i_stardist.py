# GN. No published row: a model for a CPU.
_base_ = '../_base_/deeplabv3_r18-d16_stardist.py'

norm_cfg = dict(type='GN', num_groups=16, requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg),
)
