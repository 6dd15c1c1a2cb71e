expected = dict(
    source='mmdet gn, Mask R-CNN R50 2x',
    metrics={'coco/bbox_mAP': 0.402, 'coco/segm_mAP': 0.364},
    tolerance=0.005,
)
_base_ = [
    '../_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_2x.py',
    '../_base_/runtime_det.py',
]
norm_cfg = dict(type='GN', num_groups=32)
model = dict(
    # Detectron's weights expect BGR minus the mean, without scaling.
    data_preprocessor=dict(
        mean=[103.53, 116.28, 123.675],
        std=[1.0, 1.0, 1.0],
        bgr_to_rgb=False,
    ),
    backbone=dict(
        norm_cfg=norm_cfg,
        init_cfg=dict(
            type='Pretrained', checkpoint='open-mmlab://detectron/resnet50_gn'
        ),
    ),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
