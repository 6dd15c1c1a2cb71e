# ResNeXt-50 of 32 groups and width 4 on ImageNet.
_base_ = './resnet101_in1k.py'
model = dict(
    backbone=dict(type='ResNeXt', depth=50, groups=32, width_per_group=4)
)
