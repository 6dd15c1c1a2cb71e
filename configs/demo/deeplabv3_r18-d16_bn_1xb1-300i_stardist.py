# BN over the one image of a step in the backbone. GN in the head: its pooled
# branch has one value per channel, of which BN has no variance.
# No published row: a model for a CPU.
_base_ = '../_base_/deeplabv3_r18-d16_stardist.py'

model = dict(
    backbone=dict(norm_cfg=dict(type='BN', requires_grad=True)),
    decode_head=dict(
        norm_cfg=dict(type='GN', num_groups=16, requires_grad=True)
    ),
)
