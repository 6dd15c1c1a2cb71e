# 12 epochs, the rate falling tenfold after epochs 8 and 11, at 16 images in
# total. Leaves with another total set lr by the linear rule, 0.02 / 16 for
# each image, and base_batch_size with it.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500
    ),
    dict(
        type='MultiStepLR',
        begin=0,
        end=12,
        by_epoch=True,
        milestones=[8, 11],
        gamma=0.1,
    ),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4),
)
# For --auto-scale-lr: the total batch that lr is meant for.
auto_scale_lr = dict(enable=False, base_batch_size=16)
