"""Which norm at which batch: every run of a task sees the same images."""

tasks = dict(
    nuclei_instances=dict(
        config='configs/demo/mask-rcnn_r18_fpn64_gn-ws-all_2xb1-4e_nuclei.py',
        images=892,
        lr=0.01,
        at=1,
        metric='coco/segm_mAP',
    ),
    nuclei_masks=dict(
        config='configs/demo/deeplabv3_r18-w32-d8_gn-ws-all_1xb1-1k_nuclei.py',
        images=1000,
        lr=0.02,
        at=1,
        metric='mIoU',
    ),
    cifar_resnet8=dict(
        config='tools/experiments/tasks/cifar_resnet8.py',
        images=40000,
        lr=0.1,
        at=128,
        metric='accuracy',
    ),
    cifar_vgg6=dict(
        config='tools/experiments/tasks/cifar_vgg6.py',
        images=40000,
        lr=0.05,
        at=128,
        metric='accuracy',
    ),
)
norms = ['BN', 'GN', 'GN+WS', 'BCN', 'BCN+WS']
seeds = [0, 1, 2]
cells = [
    dict(
        task=['cifar_resnet8', 'cifar_vgg6'],
        norm=[*norms, 'BN+WS', 'BCN+WS batch', 'frozen BN'],
        images=[1, 16],
        seeds=seeds,
    ),
    dict(task='nuclei_instances', norm=norms, seeds=seeds),
    dict(task='nuclei_masks', norm=['GN', 'GN+WS', 'BCN+WS'], seeds=seeds),
    dict(
        task='nuclei_instances',
        norm=['BN', 'GN+WS', 'BCN+WS', 'BCN+WS batch'],
        images=16,
        seeds=seeds,
    ),
]
