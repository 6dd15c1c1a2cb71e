expected = dict(
    source='WS authors, DGCNN GN',
    metrics={'accuracy': 89.7, 'class_accuracy': 87.0},
    tolerance=1.0,
)
_base_ = '../_base_/dgcnn_k20_modelnet40.py'
model = dict(norm_cfg=dict(type='GN', num_groups=16))
