"""Bake WS convolutions, and fold norms into them, for deployment."""

import copy
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from . import replacement
from .checking import CONVS, Inputs, run, run_traced
from .running_statistics import RunningStatistics


def bake(
    model: nn.Module,
    inputs: Inputs = None,
    *,
    fold_estimates: bool = False,
) -> nn.Module:
    """Return a copy of a model that holds plain convolutions only.

    Formula, for ``fold_estimates``, per channel:
        weight = scale * standardized weight
        bias = scale * bias + shift
    with scale and shift as the norm declares them, for BCN:
        scale = bn_weight / sqrt(running_var + eps)
        shift = bn_bias - scale * running_mean

    Convention: the baked weight is bit for bit the one that the WS
        convolution used. Names, and so the keys of the state dict, stay;
        folding adds ``bias`` to convolutions and takes from norms what it
        folds: a BCN becomes ``nn.GroupNorm`` with the outer affine repeated
        per channel. The copy is for eval and export: trained further, it is
        another model.

    Args:
        model: any model. It is left as it was.
        inputs: see :func:`check`; needed with ``fold_estimates``.
        fold_estimates: whether to fold the running statistics of every norm
            into the convolution before it.

    Raises:
        ValueError: a standardized convolution is not of ``ws_mm``; or a norm
            has no fold, or does not follow, proven, exactly one convolution
            that feeds nothing else, or computes something else behind it.
    """
    foreign = [
        name
        for name, module in model.named_modules()
        if isinstance(module, CONVS)
        and replacement.standardizes(module)
        and not replacement.is_ours(module)
    ]
    if foreign:
        more = f' and {len(foreign) - 1} more' if foreign[1:] else ''
        raise ValueError(
            f'{foreign[0]}{more}: only the convolutions of ws_mm can be '
            "baked. For mmcv's ConvWS, build the model with "
            "conv_cfg=dict(type='ws_mm.WSConv2d'), which loads its "
            "checkpoints; timm's StdConv2d can be deployed as it is; of a "
            'parametrized or pruned one, make the weight a parameter first '
            '(torch.nn.utils.parametrize.remove_parametrizations, '
            'torch.nn.utils.prune.remove)'
        )
    pairs = _pairs_to_fold(model, inputs) if fold_estimates else []
    baked = copy.deepcopy(model)
    modules = dict(baked.named_modules())
    for module in modules.values():
        if replacement.is_ours(module):
            _bake_conv(module)
        elif _makes_ours(vars(module).get('conv_cfg')):
            # RepVGG builds convolutions again when it is deployed.
            module.conv_cfg = None
    for conv_name, norm_name in pairs:
        _fold(modules[conv_name], modules[norm_name])
    if pairs:
        _compare(model, modules, pairs, inputs)
    return baked


def _compare(
    model: nn.Module,
    baked: Mapping[str, nn.Module],
    pairs: Iterable[tuple[str, str]],
    inputs: Inputs,
) -> None:
    """See that each folded pair computes what it did, on what it is given."""
    copied = copy.deepcopy(model)
    modules = dict(copied.named_modules())
    errors = dict.fromkeys(pairs, 0.0)

    def compare(pair: tuple[str, str]) -> Callable[..., None]:
        conv, norm = (copy.deepcopy(baked[name]).eval() for name in pair)
        # Its own modes are those of the inputs, which may train it.
        own = copy.deepcopy(modules[pair[1]]).eval()
        if pair[1].startswith(f'{pair[0]}.'):
            norm = own = nn.Identity()  # a convolution that holds its norm
        # What a hook is given has been through them.
        conv._forward_pre_hooks.clear()

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if not output.numel():
                return  # as of a detector that finds nothing
            expected = own(output)
            error = (norm(conv(*args, **kwargs)) - expected).abs().max()
            largest = expected.abs().max()
            # As rounding of the weights may move it.
            if not error <= 4 * torch.finfo(error.dtype).eps ** 0.5 * largest:
                errors[pair] = float(error / largest)

        return hook

    for pair in pairs:
        # Behind the hooks that are there.
        modules[pair[0]].register_forward_hook(compare(pair), with_kwargs=True)
    run(copied, inputs)
    for (conv, norm), error in errors.items():
        if error:
            raise ValueError(
                f'cannot fold the estimates: {norm} behind {conv} would '
                f'compute something else (relative difference {error:.1e}), '
                'since a hook or a forward of its own changes what the '
                'convolution returns. Bake without fold_estimates'
            )


def _fed(
    model: nn.Module,
    norms: Mapping[nn.Module, Any],
    others: set[str],
) -> str:
    names = {module: name for name, module in model.named_modules()}
    return ' and '.join([*(names[norm] for norm in norms), *sorted(others)])


def _pairs_to_fold(model: nn.Module, inputs: Inputs) -> list[tuple[str, str]]:
    """Names of each norm and the one convolution that feeds nothing else."""
    names = {module: name for name, module in model.named_modules()}
    layers = [m for m in names if isinstance(m, RunningStatistics)]
    if not layers:
        return []
    if inputs is None:
        raise ValueError(
            'fold_estimates proves which convolution feeds which norm by '
            'running the model: give inputs=, such as torch.randn(1, 3, 64, '
            '64)'
        )
    trace = run_traced(model, inputs, layers)
    problems, pairs = [], []
    for norm in layers:
        feeders = trace.feeders.get(norm, set())
        convs = [conv for conv in feeders if conv is not None]
        if norm.folded() is None:
            kind = type(norm).__name__
            problems.append(f'{names[norm]} is a {kind}, which has no fold')
        elif not feeders:
            problems.append(f'{names[norm]} is not reached by the inputs')
        elif None in feeders:
            problems.append(f'{names[norm]} does not follow a convolution')
        elif len(convs) > 1:
            shared = ' and '.join(sorted(names[conv] for conv in convs))
            problems.append(f'{names[norm]} is shared by {shared}')
        elif len(trace.norms[convs[0]]) > 1 or trace.others.get(convs[0]):
            fed = _fed(
                model, trace.norms[convs[0]], trace.others.get(convs[0], set())
            )
            problems.append(f'{names[convs[0]]} feeds {fed}')
        elif replacement.ws_type(convs[0]) is None:
            problems.append(
                f'{names[convs[0]]} is a {type(convs[0]).__name__}'
            )
        else:
            pairs.append((names[convs[0]], names[norm]))
    if problems:
        raise ValueError(
            f'cannot fold the estimates: {"; ".join(problems)}. Bake without '
            'fold_estimates, or export with torch.export or ONNX, which need '
            'no folding'
        )
    return pairs


def _makes_ours(conv_cfg: Any) -> bool:
    """Return whether a ``conv_cfg`` makes convolutions of ``ws_mm``."""
    kind = conv_cfg.get('type') if isinstance(conv_cfg, dict) else None
    found = MODELS.get(kind) if isinstance(kind, str) else kind
    ours = (*replacement.WS_TO_PLAIN,)
    return isinstance(found, type) and issubclass(found, ours)


@torch.no_grad()
def _bake_conv(conv: Any) -> None:
    weight = conv.standardized_weight()
    # In place, so that whatever holds the layer, under however many names,
    # holds the plain one.
    conv.__class__ = replacement.plain_type(conv)
    vars(conv).pop('plain_type', None)
    del conv.eps, conv.eps_mode
    # What a subclass computes its filters from, besides the weight.
    for own in (conv._parameters, conv._buffers):
        for name in own.keys() - {'weight', 'bias'}:
            del own[name]
    # Its own, where another layer has the same raw filters.
    conv.weight = nn.Parameter(weight, conv.weight.requires_grad)


@torch.no_grad()
def _fold(conv: Any, norm: Any) -> None:
    scale, shift, left = norm.folded()
    weight = conv.weight
    if conv.bias is not None:
        shift = shift + scale * conv.bias
    per_filter = scale.view(-1, *[1] * (weight.dim() - 1))
    rows = replacement.rows_of(conv, weight.double()) * per_filter
    folded = replacement.rows_of(conv, rows)
    conv.weight = nn.Parameter(folded.to(weight), weight.requires_grad)
    conv.bias = nn.Parameter(shift.to(weight), weight.requires_grad)
    if isinstance(norm, replacement.WithAct):
        _give_act(left, norm.drop, norm.act)
    replacement.become(norm, left, keep=False)


def _give_act(norm: Any, drop: nn.Module, act: nn.Module) -> None:
    norm.drop, norm.act = drop, act
    kind: Any = type(norm)
    if kind is nn.GroupNorm:
        # The layer that it was made of is timm's, so timm is there.
        layers: Any = importlib.import_module('timm.layers')
        norm.__class__, norm._fast_norm = layers.GroupNormAct, False
    else:
        norm.__class__ = replacement.mixed(replacement.WithAct, kind)
