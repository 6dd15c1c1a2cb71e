expected = dict(
    _delete_=True,
    source='WS authors, Mask R-CNN X101-32x4d 2x, 4x1 images',
    metrics={'coco/bbox_mAP': 0.4312, 'coco/segm_mAP': 0.3834},
    tolerance=0.005,
)
_base_ = './mask-rcnn_x101-32x4d_fpn_gn-ws-all_8xb1-2x_coco.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].milestones = [20, 23]
