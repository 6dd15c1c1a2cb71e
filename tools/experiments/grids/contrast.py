"""How the accuracy of each norm depends on the contrast of an image.

On nuclei, from dim fluorescence to bright stains: without distortion of the
brightness in training, with each image standardized, and with what could
mend the published form. On photographs with and without standardization.
"""

_base_ = './_base_/tasks.py'

three, two = [0, 1, 2], [0, 1]
raw = dict(task='nuclei_masks_raw', lr_factor=3.0, seeds=three)
standardized = dict(raw, task='nuclei_masks_standardized', seeds=two)
cifar = dict(task='cifar_resnet8', lr_factor=10.0)
slow = dict(
    norm='BCN+WS',
    norm_cfg=dict(momentum=0.01),
    name='BCN+WS, rate 0.01, debiased',
    hooks=[dict(type='UpdateRateHook', schedule='debiased')],
)
cells = [
    dict(raw, norm=['GN+WS', 'BCN+WS']),
    dict(raw, **slow),
    dict(standardized, norm='GN+WS'),
    dict(standardized, **slow),
    *[
        {**raw, **slow, 'seeds': two, 'name': name, **changes}
        for name, changes in (
            ('BCN+WS, outer affine per channel', dict(norm='BCN+WS channel')),
            (
                'BCN+WS, half of its own statistics',
                dict(
                    norm='BCN+WS variant',
                    norm_cfg=dict(momentum=0.01, blend=0.5),
                ),
            ),
        )
    ],
    dict(cifar, norm='GN+WS', seeds=three),
    dict(cifar, **slow, seeds=three),
    *[
        {
            **cifar,
            **row,
            'seeds': two,
            'name': row['norm'] + ', standardized images',
            'options': {'model.standardize': True},
        }
        for row in (dict(norm='GN+WS'), slow)
    ],
]
