# DeepLabV3 as the authors of WS and BCN trained it on VOC: output stride 16,
# ASPP of 256 channels at rates 6, 12, 18, no auxiliary head, no dropout. One
# difference: MMSegmentation's ASPPHead fuses its branches by a 3x3 conv, the
# authors' by a 1x1. Each config sets conv_cfg and norm_cfg.
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        # Padding comes after normalization, so 0 is the mean colour.
        pad_val=0,
        seg_pad_val=255,
        size=(513, 513),
        # VOC images have at most 500 pixels per side.
        test_cfg=dict(size=(513, 513)),
    ),
    backbone=dict(
        # 7x7 stem: the pretrained weights have no deep stem (ResNetV1c).
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        # The first block of layer4 has dilation 1, as in the authors' code.
        contract_dilation=True,
        # The authors' multi-grid (1, 1, 1) multiplies the dilations by 1.
        # MMSegmentation's option replaces them, so (1, 1, 1) would undo them.
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
            # Mean over labelled pixels, as in torch: padding does not count.
            avg_non_ignore=True,
        ),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
