# 50 epochs of polynomial decay with 16 images per step, as the authors trained
# on VOC: 662 iterations per epoch, 33100 in total. For another number of
# images, the learning rate is 0.007 / 16 per image.
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
        # The rate decays per iteration, not per epoch.
        convert_to_iter_based=True,
    )
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.007, momentum=0.9, weight_decay=1e-4),
)
# The images per step that lr is for; read by --auto-scale-lr.
auto_scale_lr = dict(enable=False, base_batch_size=16)
