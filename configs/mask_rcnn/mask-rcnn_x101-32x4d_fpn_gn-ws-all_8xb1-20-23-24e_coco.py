# WS authors, Mask R-CNN X101-32x4d 2x, 4x1 images: 43.12 box, 38.34 mask AP.
_base_ = './mask-rcnn_x101-32x4d_fpn_gn-ws-all_8xb1-2x_coco.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].milestones = [20, 23]
