# 200 epochs with 128 images per step, MMPretrain's schedule of CIFAR-10; the
# learning rate falls tenfold after epochs 100 and 150.
_base_ = './imagenet_90e.py'
train_cfg = dict(max_epochs=200)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(end=200, milestones=[100, 150])
auto_scale_lr = dict(base_batch_size=128)
