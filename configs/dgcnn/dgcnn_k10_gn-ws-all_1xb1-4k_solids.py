# GN and WS. No published row: a model for a CPU.
_base_ = '../_base_/dgcnn_k10_solids.py'
model = dict(
    conv_cfg=dict(type='ws_mm.WSConv2d'),
    norm_cfg=dict(type='GN', num_groups=16),
)
