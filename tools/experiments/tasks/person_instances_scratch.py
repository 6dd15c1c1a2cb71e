"""The same from random weights."""

_base_ = './person_instances.py'

model = dict(backbone=dict(init_cfg=None))
