"""Nuclei as the microscope saw them: no distortion of brightness."""

_base_ = './nuclei_masks.py'

train_pipeline = [
    step
    for step in _base_.train_pipeline
    if step['type'] != 'PhotoMetricDistortion'
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
