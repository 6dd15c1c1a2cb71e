# DeepLabV3 as the authors of WS and BCN trained it on VOC: output stride 16,
# ASPP of 256 channels at rates 6, 12, 18, no auxiliary head, no dropout. What
# differs is mmseg's ASPPHead: it fuses its branches by a 3x3 conv, theirs by
# a 1x1. Leaves say how it is normalized.
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        # Padding follows normalization: 0 is the mean colour.
        pad_val=0,
        seg_pad_val=255,
        size=(513, 513),
        # VOC images have at most 500 pixels a side.
        test_cfg=dict(size=(513, 513)),
    ),
    backbone=dict(
        # The 7x7 stem: the pretrained weights have no deep one (ResNetV1c).
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        # The first block of layer4 keeps dilation 1, as the authors' does.
        contract_dilation=True,
        # Multi-grid (1, 1, 1). mmseg's multi_grid replaces the dilations
        # instead of multiplying them, so (1, 1, 1) would undo them.
        multi_grid=None,
        frozen_stages=-1,
        norm_eval=False,
        style='pytorch',
    ),
    decode_head=dict(
        type='ASPPHead',
        in_channels=2048,
        in_index=3,
        channels=256,
        dilations=(1, 6, 12, 18),
        dropout_ratio=0,
        num_classes=21,
        align_corners=True,
        loss_decode=dict(
            type='CrossEntropyLoss',
            use_sigmoid=False,
            loss_weight=1.0,
            # The mean over labelled pixels, as torch's: padding does not
            # count.
            avg_non_ignore=True,
        ),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
