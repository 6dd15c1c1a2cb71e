# GN and WS. No published row: a model for a CPU.
_base_ = '../_base_/deeplabv3_r18-d16_stardist.py'

conv_cfg = dict(type='ws_mm.WSConv2d')
norm_cfg = dict(type='GN', num_groups=16, requires_grad=True)
model = dict(
    backbone=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    decode_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
)
