"""Nuclei, every image standardized first, in training and validation."""

_base_ = './nuclei_masks.py'

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='StandardizeImage'),
            dict(type='LoadAnnotations'),
            dict(
                type='RandomResize',
                scale=(256, 256),
                ratio_range=(0.75, 2.0),
                keep_ratio=True,
            ),
            dict(type='RandomCrop', crop_size=(256, 256)),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='RandomFlip', prob=0.5, direction='vertical'),
            dict(type='PackSegInputs'),
        ]
    )
)
val_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='StandardizeImage'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ]
    )
)
