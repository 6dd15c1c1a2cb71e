expected = dict(
    source='BCN authors, DeepLabV3 R101 BCN+WS',
    metrics={'mIoU': 78.10},
    tolerance=1.0,
)
_base_ = [
    '../_base_/models/deeplabv3_r50-d16.py',
    '../_base_/datasets/voc12aug_513.py',
    '../_base_/schedules/schedule_voc_50e.py',
    '../_base_/runtime_seg.py',
]
# eps outside the root, as in the authors' DeepLab. They trained these weights
# with eps inside.
conv_cfg = dict(type='ws_mm.WSConv2d')
norm_cfg = dict(
    type='ws_mm.BCN',
    num_groups=32,
    mode='sync_batch',
    momentum=0.1,  # as nn.BatchNorm2d, since these are batch statistics
)
model = dict(
    backbone=dict(
        depth=101,
        conv_cfg=conv_cfg,
        norm_cfg=norm_cfg,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://www.cs.jhu.edu/~syqiao/BatchChannelNormalization/rn101_bcn_ws.pth',
        ),
    ),
    decode_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
)
