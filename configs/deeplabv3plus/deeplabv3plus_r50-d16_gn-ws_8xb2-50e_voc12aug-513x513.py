# No published row: the authors published DeepLabV3 only.
_base_ = [
    '../_base_/models/deeplabv3plus_r50-d16.py',
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
    # mmseg gives no conv_cfg to the separable convs: 10 plain ones remain
    # under GN, which is why the name has no -all.
    decode_head=dict(
        conv_cfg=conv_cfg,
        # 32 groups divide neither 48 channels (c1) nor 304.
        norm_cfg=dict(type='GN', num_groups=16),
    ),
)
