expected = dict(
    _delete_=True,
    source='WS authors, Mask R-CNN X101-32x4d 2x, 4x1 images',
    metrics={'coco/bbox_mAP': 0.4312, 'coco/segm_mAP': 0.3834},
    tolerance=0.005,
)
_base_ = './mask-rcnn_x101-32x4d_fpn_gn-ws-all_8xb2-20-23-24e_coco.py'
train_dataloader = dict(batch_size=1)
# Linear rule: 0.02 at 16 images, 8 here.
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
