"""Nuclei, every image standardized first, in training and validation."""

_base_ = './nuclei_masks_raw.py'

standardize = dict(type='StandardizeImage')  # right after loading
load, *then = _base_.train_pipeline
train_pipeline = [load, standardize, *then]
load, *then = _base_.test_pipeline
test_pipeline = [load, standardize, *then]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
