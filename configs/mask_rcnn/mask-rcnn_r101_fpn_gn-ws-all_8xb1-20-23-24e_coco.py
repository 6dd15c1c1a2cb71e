# WS authors, Mask R-CNN R101 2x, 4x1 images: 42.73 box, 37.92 mask AP.
_base_ = './mask-rcnn_r101_fpn_gn-ws-all_8xb1-2x_coco.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].milestones = [20, 23]
