# No published row: BCN from estimates has no published VOC result.
_base_ = './deeplabv3_r50-d16_bcn-ws-all_8xb2-50e_voc12aug-513x513.py'
train_dataloader = dict(batch_size=1)
# Linear rule: 0.007 at 16 images, 8 here.
optim_wrapper = dict(optimizer=dict(lr=0.0035))
auto_scale_lr = dict(base_batch_size=8)
