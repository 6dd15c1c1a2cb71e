# Classifier with VGG-16 for images of 32 pixels: one linear layer behind the
# thirteen convolutions.
_base_ = './resnet18_cifar.py'
model = dict(backbone=dict(_delete_=True, type='VGG', depth=16))
