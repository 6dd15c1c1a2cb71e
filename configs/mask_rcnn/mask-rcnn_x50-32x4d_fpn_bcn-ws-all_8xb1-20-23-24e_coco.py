# No published row: BCN has no published COCO result.
_base_ = './mask-rcnn_x50-32x4d_fpn_bcn-ws-all_8xb1-2x_coco.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].milestones = [20, 23]
