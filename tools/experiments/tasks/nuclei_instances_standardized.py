"""Instances of nuclei, every image standardized first, as their masks are."""

_base_ = './nuclei_instances.py'

custom_imports = dict(
    imports=['experiments.contrast', 'experiments.hooks'],
    allow_failed_imports=False,
)
standardize = dict(type='StandardizeImage')  # right after loading
load, *then = _base_.train_pipeline
train_pipeline = [load, standardize, *then]
load, *then = _base_.test_pipeline
test_pipeline = [load, standardize, *then]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
