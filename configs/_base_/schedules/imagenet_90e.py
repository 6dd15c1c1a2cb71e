# 90 epochs with 256 images per step; the learning rate falls tenfold after
# epochs 30 and 60. There is no warm-up, as in the authors' code.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=90, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(
        type='MultiStepLR',
        begin=0,
        end=90,
        by_epoch=True,
        milestones=[30, 60],
        gamma=0.1,
    )
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
)
# The images per step that lr is for; read by --auto-scale-lr.
auto_scale_lr = dict(enable=False, base_batch_size=256)
