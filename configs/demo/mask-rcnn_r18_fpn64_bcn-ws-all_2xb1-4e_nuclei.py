# BCN from estimates and WS. No published row: a model for a CPU.
_base_ = [
    '../_base_/models/mask-rcnn_r18_fpn64.py',
    '../_base_/datasets/nuclei_instance.py',
    '../_base_/schedules/nuclei_4e.py',
    '../_base_/runtime_det.py',
]

conv_cfg = dict(type='ws_mm.WSConv2d')
# On these images 0.1 is better than the default, see docs/results/momentum.md.
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
