# BCN from estimates, for any number of images per GPU. No published row.
_base_ = '../_base_/resnet101_in1k.py'
model = dict(
    backbone=dict(
        conv_cfg=dict(type='ws_mm.WSConv2d', eps_mode='inside'),
        norm_cfg=dict(type='ws_mm.BCN', num_groups=32),
    )
)
custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')]
