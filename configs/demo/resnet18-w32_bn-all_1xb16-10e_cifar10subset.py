# BN. No published row: a model for a CPU.
_base_ = [
    '../_base_/models/resnet18-w32_cls.py',
    '../_base_/datasets/cifar10_subset_64.py',
    '../_base_/schedules/cifar_10e.py',
    '../_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(
        norm_cfg=dict(type='BN', requires_grad=True),
    )
)
