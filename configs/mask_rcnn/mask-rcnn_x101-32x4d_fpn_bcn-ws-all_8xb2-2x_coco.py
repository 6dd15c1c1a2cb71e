# No published row: BCN has no published COCO result.
_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_8xb2-2x_coco.py'
model = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=32,
        base_width=4,
        # The authors released no BCN X101. The GN+WS one has eps outside the
        # root and an affine per channel. The running statistics start at
        # (0, 1), where BCN equals that GN; frozen layers stay there.
        conv_cfg=dict(eps_mode='outside'),
        norm_cfg=dict(outer_affine='channel'),
        init_cfg=dict(
            type='ws_mm.PretrainedGN',
            checkpoint='open-mmlab://jhu/resnext101_32x4d_gn_ws',
        ),
    )
)
