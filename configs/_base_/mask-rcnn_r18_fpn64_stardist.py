# Base of the Mask R-CNNs of tools/demo.py: tiles of 128 pixels, resized to
# 256, 400 steps of one image, COCO metrics on the validation tiles.
_base_ = [
    'models/mask-rcnn_r18_fpn64.py',
    'datasets/nuclei_instance.py',
    'runtime_det.py',
]

data_root = 'data/demo/stardist/'
train_dataloader = dict(
    sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True),
    dataset=dict(data_root=data_root),
)
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

# Mean and std of the training tiles.
model = dict(data_preprocessor=dict(mean=[30.4] * 3, std=[23.5] * 3))

train_cfg = dict(type='IterBasedTrainLoop', max_iters=400, val_interval=400)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0001),
    clip_grad=dict(max_norm=10, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=20)
]
auto_scale_lr = dict(enable=False, base_batch_size=1)

default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=50, save_best=None),
)
log_processor = dict(window_size=10, by_epoch=False)
randomness = dict(seed=0)
