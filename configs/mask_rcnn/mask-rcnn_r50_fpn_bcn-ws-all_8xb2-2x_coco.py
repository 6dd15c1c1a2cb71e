# No published row: BCN has no published COCO result.
_base_ = [
    '../_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_2x.py',
    '../_base_/runtime_det.py',
]
conv_cfg = dict(type='ws_mm.WSConv2d')
norm_cfg = dict(type='ws_mm.BCN', num_groups=32, mode='estimate')
model = dict(
    backbone=dict(
        # The authors trained these weights with eps inside the root and an
        # outer affine per group.
        conv_cfg=dict(type='ws_mm.WSConv2d', eps_mode='inside'),
        norm_cfg=dict(outer_affine='group', **norm_cfg),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://www.cs.jhu.edu/~syqiao/BatchChannelNormalization/rn50_bcn_ws.pth',
        ),
    ),
    neck=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
        mask_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    ),
)
custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')]
