expected = dict(
    source='mmdet gn+ws, Mask R-CNN R50 2x',
    metrics={'coco/bbox_mAP': 0.406, 'coco/segm_mAP': 0.366},
    tolerance=0.005,
)
_base_ = [
    '../_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_2x.py',
    '../_base_/runtime_det.py',
]
conv_cfg = dict(type='ws_mm.WSConv2d')
norm_cfg = dict(type='GN', num_groups=32)
model = dict(
    backbone=dict(
        conv_cfg=conv_cfg,
        norm_cfg=norm_cfg,
        init_cfg=dict(
            type='Pretrained', checkpoint='open-mmlab://jhu/resnet50_gn_ws'
        ),
    ),
    neck=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
        mask_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    ),
)
