"""Masks of VOC by the small DeepLabV3, whose backbone a classifier trains."""

_base_ = './voc_masks_scratch.py'

norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=dict(  # that of the classifier
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]
    ),
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        stem_channels=32,
        base_channels=32,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        conv_cfg=None,
        norm_cfg=norm_cfg,
        norm_eval=False,
    ),
    decode_head=dict(
        _delete_=True,
        type='ASPPHead',
        in_channels=256,
        in_index=3,
        channels=128,
        dilations=(1, 6, 12, 18),
        num_classes=7,
        conv_cfg=None,
        norm_cfg=norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False),
    ),
)
custom_hooks = []
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True))
