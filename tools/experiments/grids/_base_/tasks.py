"""Tasks of the experiments: small models on real images.

All from scratch but ``voc_masks`` and ``person_instances``.
"""

masks = dict(images=1000, lr=0.02, at=1, metric='mIoU', validations=1)
half = dict(masks, images=500)
classes = dict(images=20000, at=128, metric='accuracy')
folder = 'tools/experiments/tasks/'
instances = dict(
    images=892, lr=0.01, at=1, metric='coco/segm_mAP', validations=1
)

voc = dict(images=1100, lr=0.001, at=1, metric='mIoU', validations=1)
person = dict(
    images=1238, lr=0.01, at=1, metric='coco/segm_mAP_50', validations=1
)

tasks = dict(
    voc_masks=dict(voc, config=folder + 'voc_masks.py'),
    voc_masks_long=dict(voc, images=8 * 1100, config=folder + 'voc_masks.py'),
    voc_masks_scratch=dict(voc, config=folder + 'voc_masks_scratch.py'),
    person_instances=dict(person, config=folder + 'person_instances.py'),
    person_instances_scratch=dict(
        person, config=folder + 'person_instances_scratch.py'
    ),
    nuclei_instances=dict(instances, config=folder + 'nuclei_instances.py'),
    nuclei_instances_standardized=dict(
        instances, config=folder + 'nuclei_instances_standardized.py'
    ),
    nuclei_instances_long=dict(
        instances, images=3 * 892, config=folder + 'nuclei_instances.py'
    ),
    nuclei_masks=dict(masks, config=folder + 'nuclei_masks.py'),
    nuclei_masks_long=dict(
        masks, images=16000, config=folder + 'nuclei_masks.py'
    ),
    nuclei_masks_raw=dict(half, config=folder + 'nuclei_masks_raw.py'),
    nuclei_masks_standardized=dict(
        half, config=folder + 'nuclei_masks_standardized.py'
    ),
    cifar_resnet8=dict(classes, config=folder + 'cifar_resnet8.py', lr=0.1),
    cifar_resnet8_short=dict(
        classes,
        images=10000,
        validations=1,
        config=folder + 'cifar_resnet8_short.py',
        lr=0.1,
    ),
    nuclei_masks_short=dict(half, config=folder + 'nuclei_masks_short.py'),
    cifar_resnet8_long=dict(
        classes, images=320000, config=folder + 'cifar_resnet8.py', lr=0.1
    ),
    cifar_vgg6=dict(classes, config=folder + 'cifar_vgg6.py', lr=0.05),
)
