"""What the experiments train: small models, from scratch, on real images."""

tasks = dict(
    nuclei_instances=dict(
        config='configs/demo/mask-rcnn_r18_fpn64_gn-ws-all_2xb1-4e_nuclei.py',
        images=892,
        lr=0.01,
        at=1,
        metric='coco/segm_mAP',
        validations=1,
    ),
    nuclei_masks=dict(
        config='configs/demo/deeplabv3_r18-w32-d8_gn-ws-all_1xb1-1k_nuclei.py',
        images=1000,
        lr=0.02,
        at=1,
        metric='mIoU',
        validations=1,
    ),
    cifar_resnet8=dict(
        config='tools/experiments/tasks/cifar_resnet8.py',
        images=20000,
        lr=0.1,
        at=128,
        metric='accuracy',
    ),
    cifar_vgg6=dict(
        config='tools/experiments/tasks/cifar_vgg6.py',
        images=20000,
        lr=0.05,
        at=128,
        metric='accuracy',
    ),
)
