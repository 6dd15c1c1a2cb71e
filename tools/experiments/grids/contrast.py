"""How the accuracy of each norm depends on the contrast of an image.

On nuclei, from dim fluorescence to bright stains: without distortion of the
brightness in training, with each image standardized, and with what could
mend the published form.
"""

_base_ = './_base_/tasks.py'

watch = dict(type='StopWhenDiverged')
cells = [
    dict(task='nuclei_masks_raw', norm=['GN+WS', 'BCN+WS'], seeds=[0, 1, 2]),
    dict(
        task='nuclei_masks_standardized',
        norm=['GN+WS', 'BCN+WS'],
        seeds=[0, 1, 2],
    ),
    dict(task='nuclei_masks_raw', norm='BCN+WS channel', seeds=[0, 1, 2]),
    dict(
        task='nuclei_masks_raw',
        norm='BCN+WS variant',
        norm_cfg=dict(blend=0.5),
        name='BCN+WS, half of its own statistics',
        seeds=[0, 1, 2],
    ),
    *[
        dict(
            task='nuclei_masks_raw',
            norm='BCN+WS',
            norm_cfg=dict(momentum=rate),
            name=f'BCN+WS, rate {rate}',
            seeds=[0, 1],
        )
        for rate in (0.3, 0.01)
    ],
    dict(
        task='nuclei_masks_raw',
        norm='BCN+WS',
        norm_cfg=dict(momentum=0.01),
        name='BCN+WS, rate 0.01, debiased',
        seeds=[0, 1],
        options=dict(
            custom_hooks=[
                watch,
                dict(type='UpdateRateHook', schedule='debiased'),
            ]
        ),
    ),
]
