# ResNet-50 on ImageNet: 4 GPUs x 64 images, 90 epochs.
_base_ = [
    './models/resnet50_cls.py',
    './datasets/imagenet_224.py',
    './schedules/imagenet_90e.py',
    './runtime_cls.py',
]
