# No published row: mmdet published this at 8x2 images only.
_base_ = './faster-rcnn_r50_fpn_gn-all_8xb2-1x_coco.py'
train_dataloader = dict(batch_size=1)
# Linear rule: 0.02 at 16 images, 8 here.
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
expected = None  # that of the base is of another batch
