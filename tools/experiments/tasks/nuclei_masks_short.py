"""The DeepLabV3 on nuclei, for many norms: crops of 128 pixels.

Nothing but the masks is measured.
"""

_base_ = './nuclei_masks.py'

custom_hooks = []
crop_size = (128, 128)
train_pipeline = [
    dict(step, crop_size=crop_size) if step['type'] == 'RandomCrop' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
model = dict(data_preprocessor=dict(size=crop_size))
