"""Optimizers of the hosts give BCN what a norm gets."""

from typing import Any

import pytest
from host_parts import BCN4, WS
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

bricks = pytest.importorskip('mmcv.cnn')
mmdet = pytest.importorskip('mmdet.models', exc_type=ImportError)
mmseg = pytest.importorskip('mmseg.models', exc_type=ImportError)


class ConvNeXt(nn.Module):
    """Modules named as those whose names layer-wise decay reads."""

    def __init__(self, norm: dict) -> None:
        super().__init__()
        block = bricks.ConvModule(
            3, 8, 3, bias=True, conv_cfg=WS, norm_cfg=norm
        )
        self.stages = nn.ModuleList([nn.ModuleList([block])])


def rates(
    paramwise: dict[str, Any],
    kind: str = 'DefaultOptimWrapperConstructor',
    norm: dict = BCN4,
) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of each parameter, where both start at 1."""
    model = nn.Module()
    model.backbone = ConvNeXt(norm)
    if paramwise.get('bypass_duplicate'):
        model.again = model.backbone.stages
    optimizer = dict(type='SGD', lr=1.0, weight_decay=1.0)
    scope = kind.partition('.')[0] if '.' in kind else 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        wrapper = build_optim_wrapper(
            model,
            dict(
                optimizer=optimizer,
                constructor=kind,
                paramwise_cfg=paramwise,
            ),
        )
    names = {p: name for name, p in model.named_parameters()}
    return {
        names[p].removeprefix('backbone.stages.0.0.'): (
            group['lr'],
            group['weight_decay'],
        )
        for group in wrapper.optimizer.param_groups
        for p in group['params']
        if p in names
    }


DECAY = dict(decay_rate=0.5, num_layers=6)


CONSTRUCTORS = {
    'norm_decay_mult': (dict(norm_decay_mult=0.0), (1, 0)),
    'bias': (dict(bias_lr_mult=2.0), (1, 1)),
    'bias and norm': (
        dict(bias_decay_mult=0.5, norm_decay_mult=0.1),
        (1, 0.1),
    ),
    'flat': (dict(norm_decay_mult=0.1, flat_decay_mult=0.0), (1, 0.1)),
    'custom_keys': (
        dict(
            custom_keys={'0.bn': dict(lr_mult=0.1, decay_mult=0.2)},
            norm_decay_mult=0.0,
        ),
        (0.1, 0.2),
    ),
    'bypass_duplicate': (
        dict(norm_decay_mult=0.0, bypass_duplicate=True),
        (1, 0),
    ),
    'mmseg.ForceDefaultOptimWrapperConstructor': (
        dict(norm_decay_mult=0.1, bias_lr_mult=2.0),
        (1, 0.1),
    ),
    **{
        f'{scope}.LearningRateDecayOptimizerConstructor {kind}': (
            DECAY | dict(decay_type=kind),
            (lr, 0),
        )
        for scope in ('mmdet', 'mmseg')
        for kind, lr in (('layer_wise', 2**-6), ('stage_wise', 2**-6))
    },
}


@pytest.mark.parametrize('case', CONSTRUCTORS)
def test_optimizers_take_all_four_parameters_for_a_norm(case: str) -> None:
    paramwise, expected = CONSTRUCTORS[case]
    kind = case.partition(' ')[0] if '.' in case else None
    found = rates(paramwise, *[kind] if kind else [])
    norm = {
        name: rate for name, rate in found.items() if name.startswith('bn.')
    }
    assert set(norm) == {'bn.weight', 'bn.bias', 'bn.bn_weight', 'bn.bn_bias'}
    assert set(norm.values()) == {expected}
    # The convolution is told apart.
    assert found['conv.weight'] == (1, 1) or 'LearningRate' in case
    if 'bias' in case:
        assert found['conv.bias'] not in (expected, (1, 1))


def test_bias_decay_alone_reaches_a_bias_as_it_does_in_group_norm() -> None:
    # The host goes by the name `bias` here, whatever the module is.
    found = rates(dict(bias_decay_mult=0.5))
    norm = {name: wd for name, (_, wd) in found.items() if 'bn.' in name}
    group_norm = dict(type='GN', num_groups=4)
    other = rates(dict(bias_decay_mult=0.5), norm=group_norm)
    assert norm.pop('bn.bias') == other['gn.bias'][1] == 0.5
    assert set(norm.values()) == {other['gn.weight'][1]} == {1}
