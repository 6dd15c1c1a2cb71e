# Classifier with ResNet-18 of half the channels, the backbone of the small
# DeepLabV3 with a plain stem.
_base_ = './resnet50_cls.py'
model = dict(
    backbone=dict(depth=18, stem_channels=32, base_channels=32),
    head=dict(num_classes=10, in_channels=256, topk=(1,)),
)
