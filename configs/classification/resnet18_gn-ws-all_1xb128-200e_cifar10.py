# GN and WS. No published row with this schedule.
_base_ = [
    '../_base_/models/resnet18_cifar.py',
    '../_base_/datasets/cifar10.py',
    '../_base_/schedules/cifar_200e.py',
    '../_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(
        conv_cfg=dict(type='ws_mm.WSConv2d'),
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True),
    )
)
