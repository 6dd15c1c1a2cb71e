# DeepLabV3 with a separable ASPP and a decoder that joins it with layer1.
_base_ = './deeplabv3_r50-d16.py'
model = dict(
    decode_head=dict(
        type='DepthwiseSeparableASPPHead', c1_in_channels=256, c1_channels=48
    )
)
