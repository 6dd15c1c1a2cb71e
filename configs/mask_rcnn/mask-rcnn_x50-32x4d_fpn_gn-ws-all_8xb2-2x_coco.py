expected = dict(
    source='mmdet gn+ws, Mask R-CNN X50-32x4d 2x',
    metrics={'coco/bbox_mAP': 0.411, 'coco/segm_mAP': 0.370},
    tolerance=0.005,
)
_base_ = './mask-rcnn_r50_fpn_gn-ws-all_8xb2-2x_coco.py'
model = dict(
    backbone=dict(
        type='ResNeXt',
        groups=32,
        base_width=4,
        init_cfg=dict(checkpoint='open-mmlab://jhu/resnext50_32x4d_gn_ws'),
    )
)
