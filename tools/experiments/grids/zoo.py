"""Every norm and filter of ws_mm at 1, 2, 4 and 16 images per step.

Each takes the best of some learning rates: 3 and 10 times the linear rule's
with photographs, at 16 images 1 time, too; 1 and 3 times with nuclei. The
rate was chosen with seed 0; those from which something is concluded have two
more. Cross-Iteration BN, which was best at the lowest rate, has lower ones.
"""

_base_ = './_base_/tasks.py'

norms = [
    *('BN', 'GN', 'GN+WS', 'BCN', 'BCN+WS', 'BCN+WS batch', 'MABN'),
    *('Cross-Iteration BN', 'Batch Renorm', 'Online Norm', 'mean-only BN'),
    *('Switchable Norm', 'Batch-Instance Norm', 'Batch Group Norm'),
    *('Positional Norm', 'Sandwich BN', 'BNET', 'FRN', 'EvoNorm-B0'),
    *('EvoNorm-S0', 'GroupNorm1', 'IterNorm', 'SWBN', 'GN, WN'),
    *('GN, centered', 'GN, scaled WS', 'GN, adaptive WS'),
]
# Rates that were the best of seed 0.
concluded = {
    'GN': 3.0,
    'GN+WS': 3.0,
    'BCN+WS': 10.0,
    'MABN': 3.0,
    'EvoNorm-S0': 3.0,
}
cells = [
    dict(task=task, norm=norms, images=batch, lr_factor=factors, seeds=[0])
    for task, batch, factors in (
        ('cifar_resnet8_short', 1, [3.0, 10.0]),
        ('cifar_resnet8_short', 16, [1.0, 3.0, 10.0]),
        ('cifar_resnet8_short', 2, [3.0, 10.0]),
        ('cifar_resnet8_short', 4, [3.0, 10.0]),
        *(
            ('nuclei_masks_short', batch, [1.0, 3.0])
            for batch in (1, 16, 2, 4)
        ),
    )
] + [
    dict(task='cifar_resnet8_short', norm=norm, lr_factor=factor, seeds=seeds)
    for norm, factor, seeds in (
        *((norm, factor, [1, 2]) for norm, factor in concluded.items()),
        ('Cross-Iteration BN', [0.3, 1.0], [0]),
    )
]
