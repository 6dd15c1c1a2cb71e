expected = dict(
    source='mmdet gn+ws, Mask R-CNN R101 20-23-24e',
    metrics={'coco/bbox_mAP': 0.431, 'coco/segm_mAP': 0.386},
    tolerance=0.005,
)
_base_ = './mask-rcnn_r101_fpn_gn-ws-all_8xb2-2x_coco.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].milestones = [20, 23]
