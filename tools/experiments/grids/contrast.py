"""How the accuracy of each norm depends on the contrast of an image.

On nuclei, from dim fluorescence to bright stains: without distortion of the
brightness in training, with each image standardized, and with what could
mend the published form. On photographs with and without standardization.
"""

_base_ = './_base_/tasks.py'

three, two = [0, 1, 2], [0, 1]
raw = dict(task='nuclei_masks_raw', lr_factor=3.0, seeds=three)
cifar = dict(task='cifar_resnet8', lr_factor=10.0, seeds=three)
cells = [
    dict(raw, norm=['GN+WS', 'BCN+WS']),
    dict(raw, task='nuclei_masks_standardized', norm=['GN+WS', 'BCN+WS']),
    dict(raw, norm='BCN+WS channel', seeds=two),
    dict(
        raw,
        norm='BCN+WS variant',
        norm_cfg=dict(blend=0.5),
        name='BCN+WS, half of its own statistics',
        seeds=two,
    ),
    *[
        dict(
            raw,
            norm='BCN+WS',
            norm_cfg=dict(momentum=rate),
            name=f'BCN+WS, rate {rate}',
            seeds=two,
        )
        for rate in (0.3, 0.01)
    ],
    dict(
        raw,
        norm='BCN+WS',
        norm_cfg=dict(momentum=0.01),
        name='BCN+WS, rate 0.01, debiased',
        seeds=two,
        options=dict(
            custom_hooks=[
                dict(type='StopWhenDiverged'),
                dict(type='TrainModeGapHook'),
                dict(type='RecalibratedHook'),
                dict(type='UpdateRateHook', schedule='debiased'),
            ]
        ),
    ),
    *[
        dict(
            cifar,
            norm=norm,
            **options,
        )
        for norm in ('GN+WS', 'BCN+WS')
        for options in (
            {},
            dict(
                name=f'{norm}, standardized images',
                options={'model.standardize': True},
            ),
        )
    ],
]
