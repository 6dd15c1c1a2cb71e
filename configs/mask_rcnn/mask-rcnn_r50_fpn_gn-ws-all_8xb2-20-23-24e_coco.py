# mmdet gn+ws, Mask R-CNN R50 20-23-24e: 41.1 box, 37.1 mask AP.
_base_ = './mask-rcnn_r50_fpn_gn-ws-all_8xb2-2x_coco.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].milestones = [20, 23]
