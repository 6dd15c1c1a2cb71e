expected = dict(
    _delete_=True,
    source='WS authors, Mask R-CNN R50 2x, 4x2 images',
    metrics={'coco/bbox_mAP': 0.4081, 'coco/segm_mAP': 0.3651},
    tolerance=0.005,
)
_base_ = './mask-rcnn_r50_fpn_gn-ws-all_8xb1-2x_coco.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].milestones = [20, 23]
