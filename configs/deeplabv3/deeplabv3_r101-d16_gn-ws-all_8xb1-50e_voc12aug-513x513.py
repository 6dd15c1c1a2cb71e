# No published row: the authors published 16 images in total only.
_base_ = './deeplabv3_r101-d16_gn-ws-all_8xb2-50e_voc12aug-513x513.py'
train_dataloader = dict(batch_size=1)
# Linear rule: 0.007 at 16 images, 8 here.
optim_wrapper = dict(optimizer=dict(lr=0.0035))
auto_scale_lr = dict(base_batch_size=8)
expected = None  # that of the base is of another batch
