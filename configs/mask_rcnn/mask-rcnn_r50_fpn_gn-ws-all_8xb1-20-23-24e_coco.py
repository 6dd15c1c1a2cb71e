# WS authors, Mask R-CNN R50 2x, 4x2 images: 40.81 box, 36.51 mask AP.
_base_ = './mask-rcnn_r50_fpn_gn-ws-all_8xb1-2x_coco.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].milestones = [20, 23]
