# BCN from estimates and WS. No published row: a model for a CPU.
_base_ = [
    '../_base_/models/deeplabv3_r18-w32-d8.py',
    '../_base_/datasets/nuclei_semantic.py',
    '../_base_/schedules/nuclei_1k.py',
]

conv_cfg = dict(type='ws_mm.WSConv2d')
norm_cfg = dict(type='ws_mm.BCN', num_groups=16)
model = dict(
    backbone=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    decode_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
)
custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')]
