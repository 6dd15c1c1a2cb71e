# GN and WS. No published row: a model for a CPU.
_base_ = '../_base_/tsm_r18_motions.py'
model = dict(
    backbone=dict(
        conv_cfg=dict(type='ws_mm.WSConv2d'),
        norm_cfg=dict(type='GN', num_groups=16),
    )
)
