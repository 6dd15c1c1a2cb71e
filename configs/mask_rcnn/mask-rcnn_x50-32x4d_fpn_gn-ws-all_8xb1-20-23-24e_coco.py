# WS authors, Mask R-CNN X50-32x4d 2x, 4x2 images: 42.00 box, 37.28 mask AP.
_base_ = './mask-rcnn_x50-32x4d_fpn_gn-ws-all_8xb1-2x_coco.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].milestones = [20, 23]
