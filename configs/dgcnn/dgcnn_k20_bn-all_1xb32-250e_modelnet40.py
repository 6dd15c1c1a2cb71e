expected = dict(
    source='WS authors, DGCNN BN',
    metrics={'accuracy': 91.7, 'class_accuracy': 89.3},
    tolerance=1.0,
)
_base_ = '../_base_/dgcnn_k20_modelnet40.py'
model = dict(norm_cfg=dict(type='BN'))
