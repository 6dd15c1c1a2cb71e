"""The task of the small ResNet for a VGG: six convolutions, no shortcuts."""

_base_ = './cifar_resnet8.py'

model = dict(
    _delete_=True, type='CifarVGG', width=16, norm_cfg=dict(type='BN')
)
