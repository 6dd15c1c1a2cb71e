"""The small ResNet, for many norms: nothing else is measured."""

_base_ = './cifar_resnet8.py'

custom_hooks = []
