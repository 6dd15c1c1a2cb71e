"""Convert a ResNet or ResNeXt checkpoint for a WS backbone, and verify it.

Read are torchvision's names (those of timm's ResNets are the same), with or
without 'module.': the authors' GN+WS and BCN+WS releases, timm's StdConv2d,
plain BN and GN networks; and mmdet's (gn1): open-mmlab://jhu/*. Refused with
the reason are networks that no ResNet of the hosts can hold: BiT, ResNetV2,
NFNet. Written are OpenMMLab's names. Every tensor is accounted for, and both
networks are run in float64 on a random image before anything is written.

Exact are networks of standardized filters, with their own norm. Of timm's
StdConv2d, which divides by the biased variance, a constant per layer goes
into the filters and the rest of it is in the conv_cfg that is printed. GN to
BCN is exact but for eps. Not exact, and only written with --approximate:
plain filters, whose means no standardized filter has (their scale goes into
a BN or BCN, while GN keeps that of a group only), BN to BCN, which
normalizes once more, and BN to GN, which normalizes by the image.
"""

import argparse
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import checks
import launch
import models
import torch
import torch.nn.functional as F
from checks import SetupError
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
        'another network, whatever the weights.'
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
        'another network, whatever the weights. Use the network itself '
        'through a wrapper, or a ResNet with GN+WS.'
    ),
    r'(^|[./])block\d[./]unit\d\d[./]': (
        "a BiT in Google's names, a ResNetV2, which normalizes before each "
        'convolution. The ResNet of mmdet and mmseg normalizes after it: '
        'another network, whatever the weights.'
    ),
}
# Layout found, norm asked for: largest relative difference of the mapping.
# The estimates (0, 1) of a GN differ from it by the eps added to 1.
TOLERANCE = {
    ('gn', 'gn'): 1e-9,
    ('gn', 'bcn'): 1e-3,
    ('bcn', 'bcn'): 1e-9,
    ('bn', 'bn'): 1e-9,
    ('bn', 'bcn'): 1e-9,
    ('bn', 'gn'): 1e-9,
}
# Above it, the network written is not that of the checkpoint.
SAME = 1e-3
WS_EPS = NORM_EPS = 1e-5
TIMM_EPS = 1e-6
State = dict[str, Tensor]


class Filters(NamedTuple):
    """What becomes of the filters before they are used.

    Attributes:
        formula: of the source: 'plain', 'authors' or 'timm'.
        eps_mode: of the convolutions written, and of the authors' formula.
        eps: likewise.
    """

    formula: str
    eps_mode: str
    eps: float


class Source(NamedTuple):
    """A checkpoint that was recognised.

    Attributes:
        layout: 'gn', 'bcn' or 'bn'.
        state: its tensors without 'module.' and without the classifier.
        names: for each of them, the name in the file.
        dropped: names in the file that no backbone has.
    """

    layout: str
    state: State
    names: dict[str, str]
    dropped: list[str]


def parse_args() -> argparse.Namespace:
    """Command line of the conversion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='checkpoint file: .pth, .safetensors')
    parser.add_argument(
        'out', help='new checkpoint file, .pth or .safetensors'
    )
    parser.add_argument(
        '--norm',
        choices=['gn', 'bcn', 'bn'],
        help='norm of the backbone (default: that of the source)',
    )
    parser.add_argument(
        '--num-groups',
        type=int,
        default=32,
        help='of GN and of new BCN (default: 32)',
    )
    parser.add_argument(
        '--eps-mode',
        choices=['outside', 'inside'],
        help='of the convolutions; default: inside for BCN releases, which '
        'were trained so, else outside',
    )
    parser.add_argument(
        '--ws-source',
        nargs='?',
        choices=['authors', 'timm'],
        const='authors',
        help='say that a GN or BN checkpoint was trained with standardized '
        'filters, which its tensors cannot show: by the formula of the '
        "authors and of mmcv's ConvWS (the default), or of timm's StdConv2d",
    )
    parser.add_argument(
        '--approximate',
        action='store_true',
        help='write a start for training, too, that computes something else '
        'than the checkpoint; how far off it is, is printed',
    )
    return parser.parse_args()


def _torchvision_name(name: str) -> str:
    """The name of the same tensor in torchvision's networks."""
    return re.sub(r'\bgn(\d)\.', r'bn\1.', name.removeprefix('module.'))


def refuse_unfit(names: Iterable[str]) -> None:
    """Refuse networks that a ResNet of the hosts cannot compute.

    Raises:
        SetupError: it is one; the message says why.
    """
    for pattern, reason in UNFIT.items():
        found = [name for name in names if re.search(pattern, name)]
        if found:
            raise SetupError(
                f'{found[0]}: the checkpoint is {reason} Nothing was written.'
            )


def recognise(content: dict) -> Source:
    """Say what a checkpoint holds.

    Raises:
        SetupError: a key is not explained, or there is no ResNet.
    """
    entries = content.get('state_dict', content)
    refuse_unfit(entries)
    names = {_torchvision_name(name): name for name in entries}
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
        conv: what a filter becomes before use.
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
    """What of them a standardized convolution can hold.

    Args:
        weight: the filters of the checkpoint.
        filters: what becomes of them.
        scale_absorbed: whether the norm undoes a scale per filter.
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
        groups: of GN.
        conv: what a filter becomes before use.
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


def absorb_scale(state: State, norm: str, divisor: Tensor) -> None:
    """Let a BatchNorm undo what standardizing does to the filters' scale.

    Formula, with d what divides a filter:
        running_mean / d, running_var / d^2,
        weight * sqrt(running_var + d^2 eps) / sqrt(running_var + eps)
    """
    mean, var, weight = (
        state[f'{norm}.{key}'].double()
        for key in ('running_mean', 'running_var', 'weight')
    )
    new = dict(
        running_mean=mean / divisor,
        running_var=var / divisor.square(),
        weight=weight
        * ((var + divisor.square() * NORM_EPS) / (var + NORM_EPS)).sqrt(),
    )
    for key, values in new.items():
        # float64: what is lost is what saving in float32 loses.
        state[f'{norm}.{key}'] = values


def convert(
    source: Source, kind: str, filters: Filters, num_groups: int = 32
) -> State:
    """Make the tensors of the backbone.

    Args:
        source: the checkpoint.
        kind: 'gn', 'bcn' or 'bn'.
        filters: what becomes of its filters.
        num_groups: of new BCN layers.
    """
    from ws_mm.checkpoint import from_batch_norm, to_native_layout
    from ws_mm.norm import fit_num_groups

    state = {name: values.clone() for name, values in source.state.items()}
    for conv in [n[:-7] for n in state if KNOWN.fullmatch(n)['conv']]:
        norm = re.sub(r'conv(\d)$', r'bn\1', conv)
        norm = re.sub(r'downsample\.0$', 'downsample.1', norm)
        weight = state[f'{conv}.weight'].double()
        channels = len(weight)
        divisor = torch.ones(channels).double()
        if filters.formula == 'plain':
            divisor = standardized(weight, filters)[1]
        elif filters.formula == 'timm':
            divisor /= timm_scale(weight)
            # float64: what is lost is what saving in float32 loses.
            state[f'{conv}.weight'] = weight * timm_scale(weight)
        if source.layout == 'bn' and kind != 'gn':
            absorb_scale(state, norm, divisor)
        elif source.layout == 'bn':
            for key in ('running_mean', 'running_var', 'num_batches_tracked'):
                state.pop(f'{norm}.{key}', None)
        if kind == 'bcn' and source.layout == 'bn':
            outer = torch.empty(fit_num_groups(channels, num_groups))
            from_batch_norm(state, f'{norm}.', outer)
        elif kind == 'bcn':
            affine = 'channel' if source.layout == 'gn' else 'group'
            to_native_layout(state, f'{norm}.', channels, affine)
    if kind == 'gn':
        state = {
            re.sub(r'\bbn(\d)', r'gn\1', name): values
            for name, values in state.items()
        }
    return state


def report(source: Source, state: State, kind: str) -> list[str]:
    """Say of every tensor what became of it."""
    lines, taken = [], set()
    for name, values in state.items():
        was = re.sub(r'\bgn(\d)', r'bn\1', name)
        path, _, last = was.rpartition('.')
        places = [was, f'{path}.pbn.{last}', f'{path}.bn.{last}']
        if kind == 'bcn':
            end = last.removeprefix('bn_')
            inner = end != last or last.startswith('running')
            places = [f'{path}.{sub}{end}' for sub in ('pbn.', 'bn.', '')]
            if source.layout != 'bn' and not inner:
                places = [was]
            elif source.layout == 'gn':
                places = []
            if source.layout == 'bn' and not inner and 'conv' not in path:
                places = [was] if path.endswith('downsample.0') else []
        found = [place for place in places if place in source.state]
        if not found:
            lines.append(f'created  {name} {tuple(values.shape)}')
            continue
        taken.add(found[0])
        old = source.state[found[0]].flatten()
        same = torch.equal(old.to(values), values.flatten())
        what = 'mapped ' if same else 'changed'
        lines.append(f'{what}  {source.names[found[0]]} -> {name}')
    gone = [source.names[n] for n in source.state if n not in taken]
    return lines + [f'dropped  {name}' for name in source.dropped + gone]


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((actual - expected).abs().max() / expected.abs().max())


def save(state: State, path: str) -> None:
    """Write the tensors, marked as those of standardized convolutions."""
    from ws_mm.checkpoint import mark_standardized

    if path.endswith('.safetensors'):
        from safetensors.torch import save_file

        tensors = {name: values.contiguous() for name, values in state.items()}
        save_file(tensors, path, dict(format='pt', ws_mm='standardized'))
        return
    ordered = OrderedDict(state)
    mark_standardized(ordered)
    torch.save(dict(state_dict=ordered), path)


def choose_filters(args: argparse.Namespace, layout: str) -> Filters:
    """What becomes of the filters of a checkpoint.

    Raises:
        SetupError: the options contradict each other or the checkpoint.
    """
    formula = 'authors' if layout == 'bcn' else args.ws_source or 'plain'
    if args.ws_source != 'timm':
        default = 'inside' if layout == 'bcn' else 'outside'
        return Filters(formula, args.eps_mode or default, WS_EPS)
    if layout == 'bcn':
        raise SetupError(
            "--ws-source timm: the checkpoint has the authors' BCN layers, "
            'which timm has not. Leave the option out.'
        )
    if args.eps_mode == 'outside':
        raise SetupError(
            "--eps-mode outside: timm's StdConv2d has its eps inside. Leave "
            'the option out.'
        )
    return Filters('timm', 'inside', TIMM_EPS)


def refuse_other_function(
    args: argparse.Namespace, source: Source, filters: Filters, real: float
) -> None:
    """Refuse what computes something else, unless it was asked for.

    Raises:
        SetupError: it does; the message says by how much.
    """
    if real <= SAME or args.approximate:
        return
    if source.layout != 'bcn' and filters.formula == 'plain':
        raise SetupError(
            f'The checkpoint is a ResNet with {source.layout.upper()}, and '
            'its tensors do not show whether it was trained with weight '
            'standardization. If it was, add --ws-source (--ws-source timm '
            'for StdConv2d). If not, standardized filters cannot keep its '
            f'function (relative difference {real:.1e} on a random image): '
            '--approximate writes them as a start for training. Nothing was '
            'written.'
        )
    raise SetupError(
        f'Another norm computes something else (relative difference '
        f'{real:.1e} on a random image). Leave --norm out, or add '
        '--approximate for a start for training. Nothing was written.'
    )


def losses(source: Source, kind: str, filters: Filters) -> list[str]:
    """What of the source network the converted one has not, in words."""
    said = []
    if filters.formula == 'plain':
        said.append('the means of plain filters')
        if source.layout == 'gn' or kind == 'gn':
            said.append('their scale within a group of GN')
    if (source.layout, kind) == ('bn', 'bcn'):
        said.append('what the second normalization of BCN takes out')
    if (source.layout, kind) == ('bn', 'gn'):
        said.append('the statistics of the data, which GN takes of the image')
    return said


def main() -> None:
    """Recognise, convert, verify, write."""
    args = parse_args()
    if not args.out.endswith(('.pth', '.safetensors')):
        raise SetupError(
            f'OUT {args.out}: a checkpoint is called NAME.pth or '
            'NAME.safetensors.'
        )
    source = recognise(checks.read_checkpoint(args.source))
    kind = args.norm or source.layout
    if (source.layout, kind) not in TOLERANCE:
        legal = [new for old, new in TOLERANCE if old == source.layout]
        raise SetupError(
            f'--norm {kind}: the checkpoint has {source.layout.upper()} '
            f'layers, which become {" or ".join(legal)}.'
        )
    filters = choose_filters(args, source.layout)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 64, 64, generator=generator).double()
    bn_to_gn = (source.layout, kind) == ('bn', 'gn')
    absorbed = source.layout == 'bn' and kind != 'gn'
    expected, used = run_source(
        source,
        image,
        args.num_groups,
        lambda weight: held_filters(weight, filters, absorbed),
        bn_to_gn,
    )
    unused = [
        source.names[name]
        for name in source.state
        if (KNOWN.fullmatch(name)['conv'] or KNOWN.fullmatch(name)['norm'])
        not in used
    ]
    if unused:
        raise SetupError(
            f'{len(unused)} tensors belong to no block: '
            f'{", ".join(unused[:8])}. Nothing was written.'
        )
    state = convert(source, kind, filters, args.num_groups)
    bn_to_bcn = (source.layout, kind) == ('bn', 'bcn')
    run = (image, kind, args.num_groups, filters)
    found = difference(run_target(state, *run, bn_to_bcn), expected)
    # Saved in float32; judged above, where nothing else is lost.
    if not found <= TOLERANCE[source.layout, kind]:
        raise SetupError(
            'The converted network computes something else (largest relative '
            f'difference {found:.1e}, accepted '
            f'{TOLERANCE[source.layout, kind]:.0e}); nothing was written.'
        )
    state = {
        name: values.float() if values.is_floating_point() else values
        for name, values in state.items()
    }
    whole = run_source(
        source,
        image,
        args.num_groups,
        lambda weight: used_filters(weight, filters),
    )[0]
    real = difference(run_target(state, *run, False), whole)
    refuse_other_function(args, source, filters, real)
    print('\n'.join(report(source, state, kind)))
    print(f'recognised: ResNet with {source.layout.upper()}')
    print(f'mapping verified: relative difference {found:.1e} in float64')
    print(f'difference to the source network: {real:.1e}')
    if real > SAME:
        print(
            f'Not kept: {"; ".join(losses(source, kind, filters))}. This is '
            'a start for training, not the same network.'
        )
    checks.check_apart([Path(args.out)], (args.source,))
    folder, name = os.path.split(os.path.abspath(args.out))
    checks.check_writable(folder, 'OUT')
    models.write_together(folder, {name: lambda path: save(state, path)})
    affine = ", outer_affine='channel'" if source.layout == 'gn' else ''
    eps = '' if filters.eps == WS_EPS else f', eps={filters.eps}'
    count = f', num_groups={args.num_groups}'
    norms = dict(
        gn=f"'GN'{count}", bcn=f"'ws_mm.BCN'{count}{affine}", bn="'BN'"
    )
    mode = f'eps_mode={filters.eps_mode!r}'
    print(f"conv_cfg=dict(type='ws_mm.WSConv2d', {mode}{eps})")
    print(f'norm_cfg=dict(type={norms[kind]})')
    print(args.out)


if __name__ == '__main__':
    launch.run(main)
