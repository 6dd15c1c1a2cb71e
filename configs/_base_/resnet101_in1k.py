# ResNet-101 on ImageNet: 4 GPUs x 32 images, 100 epochs, which are the
# authors' settings for the ResNeXts, too. They did not lower the learning
# rate for half the images.
_base_ = './resnet50_in1k.py'
model = dict(backbone=dict(depth=101))
train_dataloader = dict(batch_size=32)
train_cfg = dict(max_epochs=100)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(end=100, milestones=[30, 60, 90])
auto_scale_lr = dict(base_batch_size=128)
