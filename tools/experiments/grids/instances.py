"""Forms of BCN on instances of nuclei, where the published one is behind.

Then those that help on masks and photographs, which must not lose by it.
"""

_base_ = './_base_/tasks.py'

hooks = [dict(type='AveragedHook')]
instances = dict(task='nuclei_instances', seeds=[3, 4, 5], hooks=hooks)
long = dict(task='nuclei_instances_long', seeds=[3], hooks=hooks)
masks = dict(task='nuclei_masks', seeds=[3, 4, 5], hooks=hooks, lr_factor=3.0)
photographs = dict(
    task='cifar_resnet8', seeds=[3, 4, 5], hooks=hooks, lr_factor=10.0
)
fast = dict(norm_cfg=dict(momentum=0.1))
first = dict(norm='BCN+WS channel first')
gn = dict(_delete_=True, type='GN', num_groups=16)
heads = {
    f'model.roi_head.{head}.norm_cfg': gn
    for head in ('bbox_head', 'mask_head')
}
cells = [
    dict(instances, norm='GN+WS'),
    dict(instances, **fast, norm='BCN+WS', name='BCN+WS, rate 0.1'),
    dict(instances, **first),
    dict(instances, **fast, **first, name='BCN+WS channel first, rate 0.1'),
    dict(instances, norm='MABN'),
    dict(
        instances,
        **fast,
        norm='BCN+WS',
        options=heads,
        name='BCN+WS, rate 0.1, GN+WS in the heads',
    ),
    dict(long, norm='GN+WS'),
    dict(long, norm='BCN+WS'),
    dict(long, **first),
    dict(masks, **first),
    dict(photographs, **first),
]
