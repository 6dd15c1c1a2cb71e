# No published row: the authors published DeepLabV3 only.
_base_ = './deeplabv3plus_r50-d16_syncbn-all_8xb2-50e_voc12aug-513x513.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(
            checkpoint='torchvision://resnet101',
        ),
    )
)
