# BCN from estimates and WS. No published row: a model for a CPU.
_base_ = '../_base_/deeplabv3_r18-d16_stardist.py'

conv_cfg = dict(type='ws_mm.WSConv2d')
# The default of 0.01 needs more than a few hundred steps.
norm_cfg = dict(type='ws_mm.BCN', num_groups=16, momentum=0.1)
model = dict(
    backbone=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    decode_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
)
custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')]
