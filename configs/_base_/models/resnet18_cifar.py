# Classifier with ResNet-18 for images of 32 pixels: no stride and no pooling
# in the stem.
_base_ = './resnet50_cls.py'
model = dict(
    data_preprocessor=dict(
        mean=[125.307, 122.961, 113.8575],
        std=[51.5865, 50.847, 51.255],
        to_rgb=False,  # CIFAR10 reads RGB
    ),
    backbone=dict(type='ResNet_CIFAR', depth=18),
    head=dict(num_classes=10, in_channels=512, topk=(1,)),
)
