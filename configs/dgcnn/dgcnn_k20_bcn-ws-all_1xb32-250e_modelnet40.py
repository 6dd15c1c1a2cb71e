# No published row: BCN has no published ModelNet40 result.
_base_ = '../_base_/dgcnn_k20_modelnet40.py'
model = dict(
    conv_cfg=dict(type='ws_mm.WSConv2d'),
    norm_cfg=dict(type='ws_mm.BCN', num_groups=16, mode='estimate'),
)
custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')]
