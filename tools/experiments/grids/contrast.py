"""How the accuracy of each norm depends on the contrast of an image.

On nuclei, from dim fluorescence to bright stains: without distortion of the
brightness in training, with each image standardized, and, for instances,
with what could fix the published form. On photographs with and without
standardization.
"""

_base_ = './_base_/tasks.py'

three, two = [0, 1, 2], [0, 1]
raw = dict(task='nuclei_masks_raw', lr_factor=3.0, seeds=three)
standardized = dict(raw, task='nuclei_masks_standardized', seeds=two)
cifar = dict(task='cifar_resnet8', lr_factor=10.0)
fast = dict(
    norm='BCN+WS', norm_cfg=dict(momentum=0.1), name='BCN+WS, rate 0.1'
)
blended = dict(
    norm='BCN+WS variant',
    norm_cfg=dict(blend=0.5),
    name='BCN+WS, half of its own statistics',
)
# Instances are trained without distortion of the brightness.
debiased = dict(
    norm='BCN+WS',
    name='BCN+WS, debiased',
    hooks=[dict(type='UpdateRateHook', schedule='debiased')],
)
cells = [
    dict(task='nuclei_instances', norm='GN+WS', seeds=two),
    dict(task='nuclei_instances', **debiased),
    dict(task='nuclei_instances', **fast, seeds=two),
    dict(
        task='nuclei_instances',
        norm='BCN+WS channel',
        norm_cfg=dict(momentum=0.1),
        name='BCN+WS channel, rate 0.1',
    ),
    {
        **blended,
        'task': 'nuclei_instances',
        'norm_cfg': dict(momentum=0.1, blend=0.5),
        'name': 'BCN+WS, rate 0.1, half of its own statistics',
        'seeds': two,
    },
    dict(task='nuclei_instances_standardized', norm='GN+WS'),
    dict(task='nuclei_instances_standardized', **debiased),
    dict(task='nuclei_instances_standardized', **fast),
    dict(raw, norm=['GN+WS', 'BCN+WS']),
    {**raw, **fast, 'seeds': two},
    {**raw, **blended},
    dict(standardized, norm=['GN+WS', 'BCN+WS']),
    dict(cifar, norm=['GN+WS', 'BCN+WS'], seeds=three),
    dict(cifar, **fast, seeds=three),
    dict(cifar, **blended, seeds=three),
    *[
        dict(
            cifar,
            norm=norm,
            seeds=two,
            name=f'{norm}, standardized images',
            options={'model.standardize': True},
        )
        for norm in ('GN+WS', 'BCN+WS')
    ],
]
