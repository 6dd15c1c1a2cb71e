"""A classifier trained here as the start of a segmentor and a detector.

Each against random weights, with the same images, order and learning rate.
For each NORM, gn-ws-all and bcn-ws-all, first:

    python tools/train.py \
        configs/demo/resnet18-w32_NORM_1xb16-10e_cifar10subset.py \
        --work-dir work_dirs/NORM --cfg-options train_cfg.max_epochs=4 \
        train_cfg.val_interval=4 \
        param_scheduler.1.end=4 param_scheduler.1.T_max=4
"""

brief = dict(at=1, validations=1)
demo = 'configs/demo/'
tasks = dict(
    masks_started=dict(
        brief,
        images=500,
        config='tools/experiments/tasks/voc_masks_r18.py',
        lr=0.02,
        metric='mIoU',
    ),
    instances_started=dict(
        brief,
        images=200,
        config=demo + 'mask-rcnn_r18_fpn64_gn-ws-all_2xb1-4e_nuclei.py',
        lr=0.01,
        metric='coco/segm_mAP',
    ),
)
# Options of a task, whose backbone becomes that of the classifier; seeds.
same = dict(
    masks_started=({}, [0, 1, 2]),
    instances_started=(
        {
            'model.backbone.stem_channels': 32,
            'model.backbone.base_channels': 32,
            'model.neck.in_channels': [32, 64, 128, 256],
        },
        [0],
    ),
)
starts = {
    f'{norm}, {words}': (
        norm,
        checkpoint
        and dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    )
    for norm, folder in (('GN+WS', 'gn-ws-all'), ('BCN+WS', 'bcn-ws-all'))
    for words, checkpoint in (
        ('from random weights', None),
        ('from the classifier', f'work_dirs/{folder}/epoch_4.pth'),
    )
}
cells = [
    dict(
        task=task,
        norm=norm,
        name=name,
        seeds=seeds,
        options={**options, 'model.backbone.init_cfg': init_cfg},
    )
    for task, (options, seeds) in same.items()
    for name, (norm, init_cfg) in starts.items()
]
