expected = dict(
    source='WS authors, DGCNN BN+WS',
    metrics={'accuracy': 92.0, 'class_accuracy': 89.6},
    tolerance=1.0,
)
_base_ = '../_base_/dgcnn_k20_modelnet40.py'
model = dict(conv_cfg=dict(type='ws_mm.WSConv2d'), norm_cfg=dict(type='BN'))
