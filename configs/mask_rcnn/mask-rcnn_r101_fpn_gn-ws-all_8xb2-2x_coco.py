# mmdet gn+ws, Mask R-CNN R101 2x: 42.0 box, 37.7 mask AP.
_base_ = './mask-rcnn_r50_fpn_gn-ws-all_8xb2-2x_coco.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint='open-mmlab://jhu/resnet101_gn_ws'),
    )
)
