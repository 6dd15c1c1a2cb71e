expected = dict(
    source='WS authors, ResNet-101 GN+WS',
    metrics={'accuracy/top1': 77.9, 'accuracy/top5': 93.93},
    tolerance=0.5,
)
_base_ = '../_base_/resnet101_in1k.py'
model = dict(
    backbone=dict(
        conv_cfg=dict(type='ws_mm.WSConv2d'),
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True),
        zero_init_residual=False,  # as the authors' GN+WS
    )
)
