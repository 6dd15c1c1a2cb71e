expected = dict(
    source='BCN authors, DeepLabV3 R101 BCN+WS',
    metrics={'mIoU': 78.10},
    tolerance=1.0,
)
_base_ = './deeplabv3_r50-d16_bcn-sync-ws-all_8xb2-50e_voc12aug-513x513.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(
            checkpoint='https://www.cs.jhu.edu/~syqiao/BatchChannelNormalization/rn101_bcn_ws.pth',
        ),
    )
)
