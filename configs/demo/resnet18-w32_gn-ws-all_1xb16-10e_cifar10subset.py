# GN and WS. No published row: a model for a CPU.
_base_ = [
    '../_base_/models/resnet18-w32_cls.py',
    '../_base_/datasets/cifar10_subset_64.py',
    '../_base_/schedules/cifar_10e.py',
    '../_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(
        conv_cfg=dict(type='ws_mm.WSConv2d'),
        norm_cfg=dict(type='GN', num_groups=16, requires_grad=True),
    )
)
