# No published row: BCN from estimates has no published VOC result.
_base_ = './deeplabv3_r50-d16_bcn-ws-all_8xb2-50e_voc12aug-513x513.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(
            checkpoint='https://www.cs.jhu.edu/~syqiao/BatchChannelNormalization/rn101_bcn_ws.pth',
        ),
    )
)
