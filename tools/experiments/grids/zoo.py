"""Every norm and filter of ws_mm at 1, 2, 4 and 16 images per step.

Each takes its best learning rate of three: 1, 3 and 10 times the linear
rule's with photographs, 1 and 3 times with nuclei.
"""

_base_ = './_base_/tasks.py'

same_activation = [
    *('BN', 'GN', 'GN+WS', 'BCN', 'BCN+WS', 'BCN+WS batch', 'MABN'),
    *('Cross-Iteration BN', 'Batch Renorm', 'Online Norm', 'mean-only BN'),
    *('Switchable Norm', 'Batch-Instance Norm', 'Batch Group Norm'),
    *('Positional Norm', 'Sandwich BN', 'BNET', 'GroupNorm1', 'IterNorm'),
    *('SWBN', 'GN, WN', 'GN, centered', 'GN, scaled WS', 'GN, adaptive WS'),
]
own_activation = ['FRN', 'EvoNorm-B0', 'EvoNorm-S0']
merged = [dict(type='ws_mm.NormActivationHook')]
batches = [1, 2, 4, 16]
cells = [
    dict(
        task=task,
        norm=norms,
        images=batches,
        lr_factor=factors,
        seeds=[0],
        hooks=hooks,
    )
    for task, factors in (
        ('cifar_resnet8_short', [1.0, 3.0, 10.0]),
        ('nuclei_masks_short', [1.0, 3.0]),
    )
    for norms, hooks in ((same_activation, []), (own_activation, merged))
]
