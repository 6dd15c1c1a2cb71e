# The small DeepLabV3 with half the channels and output stride 8, for small
# objects.
_base_ = './deeplabv3_r18-d16.py'

model = dict(
    backbone=dict(
        stem_channels=32,
        base_channels=32,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
    ),
    decode_head=dict(in_channels=256),
)
