"""The normalizations that experiments compare, by name."""

from typing import Any

GROUPS = 16  # the small models have few channels
WS = {'type': 'ws_mm.WSConv2d'}
ADAPTIVE = {'type': 'ws_mm.AdaptiveWSConv2d'}
GN = {'type': 'GN', 'num_groups': GROUPS}
# Said here, so that a record means the same whatever the layer's default.
BCN = {'type': 'ws_mm.BCN', 'num_groups': GROUPS, 'momentum': 0.01}
# A fiftieth of the published schedule, as the trainings are shorter.
RENORM = {
    'type': 'ws_mm.BatchRenorm',
    'warmup': 100,
    'r_steps': 800,
    'd_steps': 500,
}
OWN_ACT = {'replaces_act': True}  # of the ReLU after them
Parts = tuple[dict[str, Any] | None, dict[str, Any] | None]

# name: (conv_cfg, norm_cfg)
NORMS: dict[str, Parts] = {
    # From scratch its statistics are those of the start: nothing is
    # normalized at all.
    'frozen BN': (None, {'type': 'torchvision.ops.FrozenBatchNorm2d'}),
    'no norm': (None, None),
    'BN': (None, {'type': 'BN'}),
    'BN+WS': (WS, {'type': 'BN'}),
    'GN': (None, GN),
    'GN+WS': (WS, GN),
    'BCN': (None, BCN),
    'BCN+WS': (WS, BCN),
    'eased BCN': (None, {**BCN, 'type': 'ws_mm.EasedBCN'}),
    'eased BCN+WS': (WS, {**BCN, 'type': 'ws_mm.EasedBCN'}),
    'BCN+WS batch': (WS, {**BCN, 'mode': 'batch', 'momentum': 0.1}),
    'BCN+WS variant': (WS, {**BCN, 'type': 'VariantBCN'}),
    'BCN+WS channel first': (WS, {**BCN, 'type': 'ChannelFirstBCN'}),
    'BCN+WS channel': (WS, {**BCN, 'outer_affine': 'channel'}),
    # ws_mm/zoo; filters stand before a GN, unless they belong to a norm.
    'MABN': ({'type': 'ws_mm.CenteredConv2d'}, {'type': 'ws_mm.MABN'}),
    'Cross-Iteration BN': (None, {'type': 'ws_mm.CrossIterationBN'}),
    'Batch Renorm': (None, RENORM),
    'Online Norm': (None, {'type': 'ws_mm.OnlineNorm'}),
    'mean-only BN': (
        {'type': 'ws_mm.WNConv2d'},
        {'type': 'ws_mm.MeanOnlyBN'},
    ),
    'Switchable Norm': (None, {'type': 'ws_mm.SwitchableNorm'}),
    'Batch-Instance Norm': (None, {'type': 'ws_mm.BatchInstanceNorm'}),
    'Batch Group Norm': (None, {'type': 'ws_mm.BatchGroupNorm'}),
    'Positional Norm': (None, {'type': 'ws_mm.PositionalNorm'}),
    'Sandwich BN': (None, {'type': 'ws_mm.SandwichBN'}),
    'BNET': (None, {'type': 'ws_mm.BNET'}),
    'FRN': (None, {'type': 'ws_mm.FRN', **OWN_ACT}),
    'EvoNorm-B0': (None, {'type': 'ws_mm.EvoNormB0', **OWN_ACT}),
    'EvoNorm-S0': (None, {'type': 'ws_mm.EvoNormS0', **OWN_ACT}),
    'GroupNorm1': (None, {'type': 'ws_mm.GroupNorm1'}),
    'IterNorm': (None, {'type': 'ws_mm.IterNorm'}),
    'SWBN': (None, {'type': 'ws_mm.StochasticWhiteningBN'}),
    'GN, WN': ({'type': 'ws_mm.WNConv2d'}, GN),
    'GN, centered': ({'type': 'ws_mm.CenteredConv2d'}, GN),
    'GN, scaled WS': ({'type': 'ws_mm.ScaledWSConv2d'}, GN),
    'GN, adaptive WS': (ADAPTIVE, GN),
    'BN, adaptive WS': (ADAPTIVE, {'type': 'BN'}),
    'BCN, adaptive WS': (ADAPTIVE, BCN),
}

# By others, of their own models; box / mask AP on COCO, or top-1 accuracy on
# ImageNet of ResNet-50, in percent.
PUBLISHED = {
    'GN': 'ImageNet, 2 per GPU: 75.9 (BN 65.3)',
    'MABN': 'Mask R-CNN from scratch: 36.5 / 32.7 (SyncBN 36.8 / 33.1)',
    'Cross-Iteration BN': (
        'Mask R-CNN 1x: 38.4 / 34.7 (SyncBN 38.5 / 34.3, GN 38.5 / 35.0)'
    ),
    'Switchable Norm': 'ImageNet, 2 per GPU: 75.6 (BN 65.3, GN 75.9)',
    'Batch Group Norm': 'ImageNet, batch of 2: 76.1 (BN 66.5)',
    'BNET': 'Mask R-CNN, k = 7: 40.8 / 36.7 (BN 38.2 / 34.7)',
}


def parts_of(norm: str, **changes: Any) -> Parts:
    """The conv_cfg and norm_cfg of a norm, with settings changed.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if norm not in NORMS:
        raise ValueError(
            f'norm={norm!r} is not one of {", ".join(map(repr, NORMS))}'
        )
    conv, own = NORMS[norm]
    return conv, None if own is None else {**own, **changes}


def apply(model: Any, norm: str, **changes: Any) -> int:
    """Put a norm wherever a model config has a norm_cfg; say how often."""
    conv_cfg, norm_cfg = parts_of(norm, **changes)
    count = 0
    if isinstance(model, dict):
        if 'norm_cfg' in model:
            model['norm_cfg'] = norm_cfg and dict(norm_cfg)
            model['conv_cfg'] = conv_cfg and dict(conv_cfg)
            count += 1
        values = list(model.values())
    else:
        values = list(model) if isinstance(model, (list, tuple)) else []
    return count + sum(apply(value, norm, **changes) for value in values)
