"""ResNet-18 of half the width through mmpretrain: BN, GN+WS, BCN+WS.

The learning rates are those of batch.py for a smaller ResNet on these images.
"""

tasks = dict(
    cifar_resnet18=dict(
        config='configs/demo/resnet18-w32_bn-all_1xb16-10e_cifar10subset.py',
        images=4000,
        lr=0.1,
        at=128,
        metric='accuracy/top1',
        validations=1,
    )
)
each = dict(task='cifar_resnet18', seeds=[0, 1])
cells = [
    dict(each, norm='BN', images=[1, 16], lr_factor=3.0),
    dict(each, norm=['GN+WS', 'BCN+WS'], images=1, lr_factor=10.0),
    dict(each, norm=['GN+WS', 'BCN+WS'], images=16, lr_factor=3.0),
]
