# 50 epochs of polynomial decay at 16 images in total: the authors' VOC
# recipe, 662 iterations an epoch and 33100 in all. Leaves with another
# total set lr by the linear rule, 0.007 / 16 for each image.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=50, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(
        type='PolyLR',
        power=0.9,
        eta_min=0,
        begin=0,
        end=50,
        by_epoch=True,
        # The rate falls with every iteration, not in 50 steps.
        convert_to_iter_based=True,
    )
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.007, momentum=0.9, weight_decay=1e-4),
)
# For --auto-scale-lr: the total batch that lr is meant for.
auto_scale_lr = dict(enable=False, base_batch_size=16)
