"""A ResNet in a checkpoint: recognised by its names, run from its tensors.

The names are those of torchvision. The source network follows the formulas of
its authors, the converted one uses the layers of ws_mm and torch.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from support.checks import SetupError
from torch import Tensor

KNOWN = re.compile(
    r'(?:(?P<conv>conv1|layer\d+\.\d+\.(?:conv\d|downsample\.0))\.weight'
    r'|(?P<norm>bn1|layer\d+\.\d+\.(?:bn\d|downsample\.1))\.'
    r'(?:p?bn\.)?(?:weight|bias|running_mean|running_var|'
    r'num_batches_tracked|estbn_moving_speed)'
    r'|(?P<fc>fc|last_linear)\.(?:weight|bias))'
)
# No GroupNorm has them.
GN_ESTIMATES = re.compile(r'\bgn\d\.(running_|num_batches)')
# What a key of another network looks like, and why it stays outside.
UNFIT = {
    r'\.gain$': (
        "of timm's ScaledStdConv2d (NFNet, NF-ResNet), which multiplies each "
        'standardized filter by a learned gain and has no norm behind it; '
        'WSConv2d needs one, and the ResNet of mmdet and mmseg has one: '
        'the networks differ, whatever the weights.'
    ),
    r'(^|\.)stem\.norm\.': (
        "a ResNetV2 of timm's hybrid ViT, whose convolutions pad as "
        'TensorFlow does, more on one side than on the other. The ResNet of '
        'mmdet and mmseg pads both sides alike: another network, whatever '
        'the weights.'
    ),
    r'(^|\.)stages\.\d+\.blocks\.\d+\.norm1\.': (
        'a ResNetV2 (timm; BiT with StdConv2d), which normalizes before each '
        'convolution. The ResNet of mmdet and mmseg normalizes after it: '
        'the networks differ, whatever the weights. Use the network itself '
        'through a wrapper, or a ResNet with GN+WS.'
    ),
    r'(^|[./])block\d[./]unit\d\d[./]': (
        "a BiT in Google's names, a ResNetV2, which normalizes before each "
        'convolution. The ResNet of mmdet and mmseg normalizes after it: '
        'the networks differ, whatever the weights.'
    ),
}
WS_EPS = NORM_EPS = 1e-5
TIMM_EPS = 1e-6
State = dict[str, Tensor]


class Filters(NamedTuple):
    """Formulas of the filters before they are used.

    Attributes:
        formula: Formula of the source: 'plain', 'authors' or 'timm'.
        eps_mode: Mode of the new convolutions and of the authors' formula.
        eps: Their eps.
    """

    formula: str
    eps_mode: str
    eps: float


class Source(NamedTuple):
    """A checkpoint that was recognised.

    Attributes:
        layout: 'gn', 'bcn' or 'bn'.
        state: its tensors without 'module.' and without the classifier.
        names: Name in the file of each tensor.
        dropped: names in the file that no backbone has.
    """

    layout: str
    state: State
    names: dict[str, str]
    dropped: list[str]


def _torchvision_name(name: str, prefix: str) -> str:
    """Return the name of the same tensor in torchvision's networks."""
    name = name.removeprefix(prefix).removeprefix('module.')
    return re.sub(r'\bgn(\d)\.', r'bn\1.', name)


def prefix_of(names: Iterable[str], asked: str | None = None) -> str:
    """Return what stands before the names of the ResNet in a file.

    Args:
        names: Keys of the checkpoint.
        asked: Prefix that the user gave.

    Raises:
        SetupError: several networks, or none behind the prefix given.
    """
    first = 'layer1.0.conv1.weight'
    found = sorted(
        {name.removesuffix(first) for name in names if name.endswith(first)}
    )
    listed = ', '.join(map(repr, found)) or 'none'
    if asked is not None:
        if asked not in found:
            raise SetupError(
                f'--prefix {asked!r}: no {first} behind it. Prefixes with '
                f'a ResNet behind them: {listed}.'
            )
        return asked
    if len(found) > 1 and found != ['', 'module.']:
        raise SetupError(
            f'The checkpoint holds {len(found)} ResNets, behind the prefixes '
            f'{listed}. Choose one, as in: --prefix {found[0]}'
        )
    return found[0] if len(found) == 1 else ''


def refuse_unfit(names: Iterable[str]) -> None:
    """Reject networks that a ResNet of the hosts cannot compute.

    Raises:
        SetupError: it is one; the message says why.
    """
    for pattern, reason in UNFIT.items():
        found = [name for name in names if re.search(pattern, name)]
        if found:
            raise SetupError(
                f'{found[0]}: the checkpoint is {reason} Nothing was written.'
            )


def recognise(content: dict, prefix: str | None = None) -> Source:
    """Find the ResNet in a checkpoint.

    Args:
        content: Checkpoint file.
        prefix: Prefix of the ResNet's names; found by itself if there is
            one network.

    Raises:
        SetupError: a key is not explained, or there is no ResNet.
    """
    entries = content.get('state_dict', content)
    refuse_unfit(entries)
    prefix = prefix_of(entries, prefix)
    outside = [name for name in entries if not name.startswith(prefix)]
    entries = {n: entries[n] for n in entries if n.startswith(prefix)}
    names = {_torchvision_name(name, prefix): name for name in entries}
    if len(names) < len(entries):
        twice = sorted(set(entries) - set(names.values()))
        raise SetupError(
            f'{len(twice)} keys name a tensor that another key names, too: '
            f'{", ".join(twice[:8])}. Nothing was written.'
        )
    strange = [
        old
        for name, old in names.items()
        if not KNOWN.fullmatch(name) or GN_ESTIMATES.search(old)
    ]
    if strange:
        raise SetupError(
            f'{len(strange)} keys are not of a ResNet in torchvision names: '
            f'{", ".join(strange[:8])}. Nothing was written; remove them from '
            'the file if they belong to nothing.'
        )
    dropped = [names[n] for n in names if KNOWN.fullmatch(n)['fc']]
    state = {n: entries[names[n]] for n in names if names[n] not in dropped}
    dropped += outside
    if 'conv1.weight' not in state or 'layer1.0.conv1.weight' not in state:
        raise SetupError(
            'The checkpoint has no conv1.weight or layer1.0.conv1.weight: it '
            'is no ResNet in torchvision names.'
        )
    if any('.pbn.' in name or '.bn.' in name for name in state):
        layout = 'bcn'
    elif any(name.endswith('.running_mean') for name in state):
        layout = 'bn'
    else:
        layout = 'gn'
    return Source(layout, state, names, dropped)


def run_resnet(
    state: State,
    image: Tensor,
    conv: Callable[[Tensor], Tensor],
    norm: Callable[[str, Tensor], Tensor],
    abbr: str,
) -> tuple[Tensor, set[str]]:
    """Run a ResNet that is given by the names and shapes of its tensors.

    Args:
        state: the tensors.
        image: (N, 3, H, W).
        conv: Function that each filter goes through before use.
        norm: applies the norm of a name to a tensor.
        abbr: 'bn' or 'gn', in the names of the norms.

    Returns:
        The features, and the names of the layers that were used.

    Raises:
        SetupError: a layer is missing.
    """
    used = set()

    def step(x: Tensor, name: str, norm_name: str, stride: int) -> Tensor:
        used.update((name, norm_name))
        try:
            weight = conv(state[f'{name}.weight'].double())
            y = F.conv2d(
                x,
                weight,
                stride=stride,
                padding=weight.shape[-1] // 2,
                groups=x.shape[1] // weight.shape[1],
            )
            return norm(norm_name, y)
        except KeyError as error:
            raise SetupError(
                f'The checkpoint has {name} but no {error.args[0]}.'
            ) from error
        except RuntimeError as error:
            raise SetupError(
                f'{name} and {norm_name} do not fit together: {error}'
            ) from error

    x = F.relu(step(image, 'conv1', f'{abbr}1', 2))
    x = F.max_pool2d(x, 3, 2, 1)
    layer = 1
    while f'layer{layer}.0.conv1.weight' in state:
        block = 0
        while f'layer{layer}.{block}.conv1.weight' in state:
            path = f'layer{layer}.{block}'
            last = 3 if f'{path}.conv3.weight' in state else 2
            stride = 2 if layer > 1 and block == 0 else 1
            y = x
            for i in range(1, last + 1):
                own = stride if i == last - 1 else 1
                y = step(y, f'{path}.conv{i}', f'{path}.{abbr}{i}', own)
                y = F.relu(y) if i < last else y
            if f'{path}.downsample.0.weight' in state:
                short = f'{path}.downsample'
                x = step(x, f'{short}.0', f'{short}.1', stride)
            x = F.relu(x + y)
            block += 1
        layer += 1
    return x, used


def standardized(weight: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """Filters with zero mean and unit variance, and what divided them."""
    var, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True)
    if filters.eps_mode == 'outside':
        divisor = var.sqrt() + filters.eps
    else:
        divisor = (var + filters.eps).sqrt()
    return (weight - mean) / divisor, divisor.flatten()


def used_filters(weight: Tensor, filters: Filters) -> Tensor:
    """Filters as the source network uses them."""
    if filters.formula == 'plain':
        return weight
    if filters.formula == 'timm':
        var, mean = torch.var_mean(
            weight, (1, 2, 3), correction=0, keepdim=True
        )
        return (weight - mean) / (var + TIMM_EPS).sqrt()
    return standardized(weight, filters)[0]


def held_filters(
    weight: Tensor, filters: Filters, scale_absorbed: bool
) -> Tensor:
    """Return the part of the filters that a standardized conv can hold.

    Args:
        weight: the filters of the checkpoint.
        filters: Formulas of the filters.
        scale_absorbed: True if the norm undoes a scale per filter.
    """
    if filters.formula == 'plain':
        mean = weight.mean((1, 2, 3), keepdim=True)
        same = weight - mean
        return same if scale_absorbed else standardized(weight, filters)[0]
    used = used_filters(weight, filters)
    if filters.formula == 'timm' and not scale_absorbed:
        return used * timm_scale(weight)
    return used


def timm_scale(weight: Tensor) -> float:
    """Our filters over timm's: those of the same eps, by N and by N - 1."""
    fan_in = weight.shape[1:].numel()
    return math.sqrt((fan_in - 1) / fan_in)


def run_source(
    source: Source,
    image: Tensor,
    groups: int,
    conv: Callable[[Tensor], Tensor],
    as_gn: bool = False,
) -> tuple[Tensor, set[str]]:
    """Run the network of the checkpoint, written from its formulas.

    Args:
        source: the checkpoint.
        image: (N, 3, H, W) in float64.
        groups: Groups of GN.
        conv: Function that each filter goes through before use.
        as_gn: take the affine of its BN for that of a GN.
    """
    layout = 'gn' if as_gn else source.layout

    def norm(name: str, x: Tensor) -> Tensor:
        def get(key: str) -> Tensor:
            return source.state[f'{name}.{key}'].double().flatten()

        inner = ''
        if layout == 'bcn':
            inner = 'pbn.' if f'{name}.pbn.weight' in source.state else 'bn.'
        if layout != 'gn':
            x = F.batch_norm(
                x,
                get(f'{inner}running_mean'),
                get(f'{inner}running_var'),
                get(f'{inner}weight'),
                get(f'{inner}bias'),
            )
        if layout == 'bn':
            return x
        scale, shift = get('weight'), get('bias')
        own = scale.numel() if layout == 'bcn' else groups
        y = F.group_norm(x, own)
        repeats = x.shape[1] // scale.numel()
        scale = scale.repeat_interleave(repeats)[:, None, None]
        return y * scale + shift.repeat_interleave(repeats)[:, None, None]

    return run_resnet(source.state, image, conv, norm, 'bn')


def run_target(
    state: State,
    image: Tensor,
    kind: str,
    groups: int,
    filters: Filters,
    inner_only: bool,
) -> Tensor:
    """Run the converted network with the layers of ws_mm and torch."""
    from ws_mm import BCN, standardize_weight

    def norm(name: str, x: Tensor) -> Tensor:
        prefix = f'{name}.'
        own = {
            key.removeprefix(prefix): values
            for key, values in state.items()
            if key.startswith(prefix)
        }
        if not own:
            raise KeyError(name)
        channels = x.shape[1]
        if kind == 'bn':
            layer = torch.nn.BatchNorm2d(channels)
        elif kind == 'gn':
            layer = torch.nn.GroupNorm(groups, channels)
        elif inner_only:
            layer = torch.nn.BatchNorm2d(channels)
            own['weight'], own['bias'] = own['bn_weight'], own['bn_bias']
            own = {k: own[k] for k in layer.state_dict() if k in own}
            own['num_batches_tracked'] = torch.tensor(0)
        else:
            outer = own['weight'].numel()
            affine = 'channel' if outer == channels else 'group'
            count = groups if affine == 'channel' else outer
            layer = BCN(channels, count, outer_affine=affine)
        layer.double().load_state_dict(own)
        return layer.eval()(x)

    with torch.no_grad():
        return run_resnet(
            state,
            image,
            lambda weight: standardize_weight(
                weight, filters.eps, filters.eps_mode
            ),
            norm,
            'gn' if kind == 'gn' else 'bn',
        )[0]
