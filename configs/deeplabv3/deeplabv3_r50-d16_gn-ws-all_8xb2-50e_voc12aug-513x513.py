# No published row: the authors published R101 only.
_base_ = [
    '../_base_/models/deeplabv3_r50-d16.py',
    '../_base_/datasets/voc12aug_513.py',
    '../_base_/schedules/schedule_voc_50e.py',
    '../_base_/runtime_seg.py',
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
    decode_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
)
