# mmdet gn+ws, Mask R-CNN X50-32x4d 20-23-24e: 42.1 box, 38.0 mask AP.
_base_ = './mask-rcnn_x50-32x4d_fpn_gn-ws-all_8xb2-2x_coco.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].milestones = [20, 23]
