expected = dict(
    source='WS authors, DGCNN GN+WS',
    metrics={'accuracy': 91.2, 'class_accuracy': 88.8},
    tolerance=1.0,
)
_base_ = '../_base_/dgcnn_k20_modelnet40.py'
model = dict(
    conv_cfg=dict(type='ws_mm.WSConv2d'),
    norm_cfg=dict(type='GN', num_groups=16),
)
