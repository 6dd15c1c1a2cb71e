"""Rows of the grids of pretrained starts: what is trained, and from what."""

_base_ = './tasks.py'

bn = dict(_delete_=True, type='BN')
plain = {'model.backbone.norm_cfg': bn, 'model.backbone.conv_cfg': None}
# As mmdet's: statistics stay, affines are trained. No stage is frozen.
frozen = {**plain, 'model.backbone.norm_eval': True}
everywhere = {'model.backbone.depthwise': True}
eased = dict(type='EasedBCN', num_groups=16, momentum=0.01)
in_backbone = {
    **plain,
    'model.backbone.norm_cfg': dict(eased, _delete_=True),
}
# A gate that does not learn stays 0.
closed = {'optim_wrapper.paramwise_cfg.custom_keys.gate.lr_mult': 0}

# Names in tables, with norm, norm_cfg and options of their cells. A norm
# stands in backbone and heads, but for frozen BN.
rows = {
    'frozen BN, heads without norm': dict(norm='no norm', options=frozen),
    'frozen BN, BN in the heads': dict(norm='BN', options=frozen),
    'frozen BN, GN in the heads': dict(norm='GN', options=frozen),
    'frozen BN, GN+WS in the heads': dict(norm='GN+WS', options=frozen),
    'frozen BN, BCN+WS in the heads': dict(norm='BCN+WS', options=frozen),
    'BN': dict(norm='BN'),
    'BN to GN': dict(norm='GN'),
    'BN to GN+WS': dict(norm='GN+WS'),
    'BN to BCN': dict(norm='BCN'),
    'BN to BCN+WS': dict(norm='BCN+WS'),
    'BN to BCN+WS, depthwise filters, too': dict(
        norm='BCN+WS', options=everywhere
    ),
    'BN to BCN, eased in, learned': dict(norm='eased BCN'),
    'BN to BCN+WS, eased in, learned': dict(norm='eased BCN+WS'),
    'BN, adaptive WS': dict(norm='BN, adaptive WS'),
    'BN to GN, adaptive WS': dict(norm='GN, adaptive WS'),
    'BN to BCN, adaptive WS': dict(norm='BCN, adaptive WS'),
    'BN to BCN, eased in, GN+WS in the heads': dict(
        norm='GN+WS', options=in_backbone
    ),
    'BN by its moving statistics, GN+WS in the heads': dict(
        norm='GN+WS', options={**in_backbone, **closed}
    ),
    # Its filters have to be centered, those of one channel, too.
    'BN to MABN': dict(norm='MABN', options=everywhere),
    'BN to Cross-Iteration BN': dict(norm='Cross-Iteration BN'),
}
# Those of which something is concluded.
compared = [
    'frozen BN, GN+WS in the heads',
    'BN to GN+WS',
    'BN to BCN, eased in, learned',
    'BN to BCN, eased in, GN+WS in the heads',
]
# Rows of the task that takes longer.
fewer = [
    *compared,
    'BN by its moving statistics, GN+WS in the heads',
    'frozen BN, heads without norm',
    'frozen BN, BCN+WS in the heads',
    'BN',
    'BN to GN',
    'BN to BCN',
    'BN to BCN+WS',
]
