# mmdet gn+ws, Mask R-CNN R101 20-23-24e: 43.1 box, 38.6 mask AP.
_base_ = './mask-rcnn_r101_fpn_gn-ws-all_8xb2-2x_coco.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].milestones = [20, 23]
