"""Every norm and filter of ws_mm at 1, 2, 4 and 16 images per step.

Each takes the best of some learning rates, chosen with seed 0. Photographs:
3 and 10 times the linear rule's, at 16 images 1 time, too; at 2 and 4 images
the one that was best at one. Nuclei: 1 and 3 times at one image, 1 time at
others. Those from which something is concluded have two more seeds.
Cross-Iteration BN, which was best at the lowest rate, has lower ones. BN at
the output is no norm of a layer: it stands behind the classifier, with GN.
"""

_base_ = './_base_/tasks.py'

norms = [
    *('BN', 'GN', 'GN+WS', 'BCN', 'BCN+WS', 'BCN+WS batch', 'MABN'),
    *('Cross-Iteration BN', 'Batch Renorm', 'Online Norm', 'mean-only BN'),
    *('Switchable Norm', 'Batch-Instance Norm', 'Batch Group Norm'),
    *('Positional Norm', 'Sandwich BN', 'BNET', 'FRN', 'EvoNorm-B0'),
    *('EvoNorm-S0', 'GroupNorm1', 'IterNorm', 'SWBN', 'GN, WN'),
    *('GN, centered', 'GN, scaled WS', 'GN, adaptive WS'),
    'eased BCN',
]
# Rates that were the best of seed 0.
concluded = {
    'GN': 3.0,
    'GN+WS': 3.0,
    'BCN+WS': 10.0,
    'MABN': 3.0,
    'EvoNorm-S0': 3.0,
}
# Norms that were best at 10 times the rule's rate with one photograph.
fast = [
    *('BCN', 'BCN+WS', 'BCN+WS batch', 'Batch Renorm', 'mean-only BN'),
    *('Switchable Norm', 'FRN', 'GroupNorm1', 'IterNorm', 'GN, WN'),
    'GN, adaptive WS',
]
cells = [
    dict(task=task, norm=norms, images=images, lr_factor=factors)
    for task, images, factors in (
        ('cifar_resnet8_short', 1, [3.0, 10.0]),
        ('cifar_resnet8_short', 16, [1.0, 3.0, 10.0]),
        ('nuclei_masks_short', 1, [1.0, 3.0]),
        ('nuclei_masks_short', [16, 2, 4], 1.0),
    )
] + [
    dict(task='cifar_resnet8_short', norm=norm, **more)
    for norm, more in (
        *((n, dict(lr_factor=f, seeds=[1, 2])) for n, f in concluded.items()),
        *((n, dict(lr_factor=10.0, images=[2, 4])) for n in fast),
        *(
            (n, dict(lr_factor=3.0, images=[2, 4]))
            for n in norms
            if n not in fast
        ),
        ('Cross-Iteration BN', dict(lr_factor=[0.3, 1.0])),
    )
]
output_bn = dict(
    cifar_resnet8_short={
        'model.type': 'ws_mm.WithOutputBN',
        'model.of': 'CifarResNet',
        'model.layer': 'classifier',
    },
    nuclei_masks_short={
        'model.decode_head.type': 'ws_mm.WithOutputBN',
        'model.decode_head.of': 'ASPPHead',
        'model.decode_head.layer': 'conv_seg',
    },
)
cells += [
    dict(
        task=task,
        norm='GN',
        name='GN, BN at the output',
        options=output_bn[task],
        images=images,
        lr_factor=factors,
    )
    for task, images, factors in (
        ('cifar_resnet8_short', [1, 2, 4], 3.0),
        ('cifar_resnet8_short', 16, [1.0, 3.0, 10.0]),
        ('nuclei_masks_short', [1, 2, 4, 16], 1.0),
    )
]
