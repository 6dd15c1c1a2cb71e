expected = dict(
    source='mmdet faster_rcnn, R50 1x',
    metrics={'coco/bbox_mAP': 0.374},
    tolerance=0.005,
)
_base_ = [
    '../_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/runtime_det.py',
]
model = dict(
    backbone=dict(
        # All frozen; the published row trains scale and shift.
        norm_cfg=dict(type='BN', requires_grad=False),
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    # The head starts from scratch and has no norm: MMDetection's own.
    roi_head=dict(bbox_head=dict(type='Shared2FCBBoxHead')),
)
