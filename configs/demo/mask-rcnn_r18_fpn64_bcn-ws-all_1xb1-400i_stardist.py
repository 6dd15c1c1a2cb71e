# BCN from estimates and WS. No published row: a model for a CPU.
_base_ = '../_base_/mask-rcnn_r18_fpn64_stardist.py'

conv_cfg = dict(type='ws_mm.WSConv2d')
# The default of 0.01 needs more than a few hundred steps.
norm_cfg = dict(type='ws_mm.BCN', num_groups=16, momentum=0.1)
model = dict(
    backbone=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    neck=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
        mask_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    ),
)
custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')]
