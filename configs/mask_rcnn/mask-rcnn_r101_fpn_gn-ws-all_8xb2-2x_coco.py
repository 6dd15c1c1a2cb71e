expected = dict(
    source='mmdet gn+ws, Mask R-CNN R101 2x',
    metrics={'coco/bbox_mAP': 0.420, 'coco/segm_mAP': 0.377},
    tolerance=0.005,
)
_base_ = './mask-rcnn_r50_fpn_gn-ws-all_8xb2-2x_coco.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint='open-mmlab://jhu/resnet101_gn_ws'),
    )
)
