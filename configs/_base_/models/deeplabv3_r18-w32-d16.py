# The small DeepLabV3 at half its width, for data that takes many steps.
_base_ = './deeplabv3_r18-d16.py'

model = dict(
    backbone=dict(stem_channels=32, base_channels=32),
    decode_head=dict(in_channels=256),
)
