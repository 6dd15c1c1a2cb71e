expected = dict(
    source='WS authors, ResNeXt-101 32x4d GN+WS',
    metrics={'accuracy/top1': 78.2, 'accuracy/top5': 93.97},
    tolerance=0.5,
)
_base_ = '../_base_/resnext101-32x4d_in1k.py'
model = dict(
    backbone=dict(
        conv_cfg=dict(type='ws_mm.WSConv2d'),
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True),
        zero_init_residual=False,  # as the authors' GN+WS
    )
)
