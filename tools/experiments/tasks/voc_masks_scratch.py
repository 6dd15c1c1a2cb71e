"""The same from random weights."""

_base_ = './voc_masks.py'

model = dict(backbone=dict(init_cfg=None))
