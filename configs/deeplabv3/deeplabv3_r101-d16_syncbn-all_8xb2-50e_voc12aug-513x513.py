expected = dict(
    source='DeepLabv3.pytorch, DeepLabV3 R101 BN',
    metrics={'mIoU': 76.49},
    tolerance=1.0,
)
_base_ = './deeplabv3_r50-d16_syncbn-all_8xb2-50e_voc12aug-513x513.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(
            checkpoint='torchvision://resnet101',
        ),
    )
)
