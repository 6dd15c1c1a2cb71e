# No published row: BCN has no published COCO result.
_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_8xb2-2x_coco.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(
            checkpoint='https://www.cs.jhu.edu/~syqiao/BatchChannelNormalization/rn101_bcn_ws.pth',
        ),
    )
)
