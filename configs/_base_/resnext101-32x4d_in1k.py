# ResNeXt-101 of 32 groups and width 4 on ImageNet.
_base_ = './resnext50-32x4d_in1k.py'
model = dict(backbone=dict(depth=101))
