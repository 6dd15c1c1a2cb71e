"""Convert a ResNet or ResNeXt checkpoint for a WS backbone, and verify it.

Read are torchvision's names (those of timm's ResNets are the same), with or
without 'module.': the authors' GN+WS and BCN+WS releases, and plain BN
networks; and mmdet's (``gn1``): open-mmlab://jhu/*. Refused with the reason
are networks that no ResNet of the hosts can hold: BiT, ResNetV2, NFNet.
Written are OpenMMLab's names. Every tensor is accounted for, and both
networks are run in float64 on a random image before anything is written.
"""

import argparse
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
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
}
WS_EPS = NORM_EPS = 1e-5
State = dict[str, Tensor]


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
        help='norm of the backbone; default: that of the source',
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
        action='store_true',
        help='say that a GN checkpoint was trained with standardized weights,'
        ' which its tensors cannot show; needed for GN',
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


def standardized(weight: Tensor, eps_mode: str) -> tuple[Tensor, Tensor]:
    """Filters with zero mean and unit variance, and what divided them."""
    var, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True)
    if eps_mode == 'outside':
        divisor = var.sqrt() + WS_EPS
    else:
        divisor = (var + WS_EPS).sqrt()
    return (weight - mean) / divisor, divisor.flatten()


def run_source(
    source: Source, image: Tensor, groups: int, eps_mode: str, centered: bool
) -> tuple[Tensor, set[str]]:
    """Run the network of the checkpoint, written from its formulas.

    Args:
        source: the checkpoint.
        image: (N, 3, H, W) in float64.
        groups: of GN.
        eps_mode: of standardized convolutions.
        centered: take the mean from the filters of a plain network, which
            is what no standardized one can hold.
    """

    def conv(weight: Tensor) -> Tensor:
        if source.layout != 'bn':
            return standardized(weight, eps_mode)[0]
        mean = weight.mean((1, 2, 3), keepdim=True)
        return weight - mean if centered else weight

    def norm(name: str, x: Tensor) -> Tensor:
        def get(key: str) -> Tensor:
            return source.state[f'{name}.{key}'].double().flatten()

        inner = ''
        if source.layout == 'bcn':
            inner = 'pbn.' if f'{name}.pbn.weight' in source.state else 'bn.'
        if source.layout != 'gn':
            x = F.batch_norm(
                x,
                get(f'{inner}running_mean'),
                get(f'{inner}running_var'),
                get(f'{inner}weight'),
                get(f'{inner}bias'),
            )
        if source.layout == 'bn':
            return x
        scale, shift = get('weight'), get('bias')
        own = scale.numel() if source.layout == 'bcn' else groups
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
    eps_mode: str,
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
            lambda weight: standardize_weight(weight, WS_EPS, eps_mode),
            norm,
            'gn' if kind == 'gn' else 'bn',
        )[0]


def absorb_scale(state: State, conv: str, norm: str, eps_mode: str) -> None:
    """Let a BatchNorm undo what standardizing does to the filters' scale.

    Formula, with d what divides a filter:
        running_mean / d, running_var / d^2,
        weight * sqrt(running_var + d^2 eps) / sqrt(running_var + eps)
    """
    divisor = standardized(state[f'{conv}.weight'].double(), eps_mode)[1]
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
    source: Source, kind: str, eps_mode: str, num_groups: int = 32
) -> State:
    """Make the tensors of the backbone.

    Args:
        source: the checkpoint.
        kind: 'gn', 'bcn' or 'bn'.
        eps_mode: of its convolutions.
        num_groups: of new BCN layers.

    Raises:
        SetupError: there is no such conversion.
    """
    from ws_mm.checkpoint import from_batch_norm, to_native_layout
    from ws_mm.norm import fit_num_groups

    if (source.layout, kind) not in TOLERANCE:
        legal = [new for old, new in TOLERANCE if old == source.layout]
        raise SetupError(
            f'--norm {kind}: the checkpoint has {source.layout.upper()} '
            f'layers, which become {" or ".join(legal)}.'
        )
    state = {name: values.clone() for name, values in source.state.items()}
    for conv in [n[:-7] for n in state if KNOWN.fullmatch(n)['conv']]:
        norm = re.sub(r'conv(\d)$', r'bn\1', conv)
        norm = re.sub(r'downsample\.0$', 'downsample.1', norm)
        channels = state[f'{conv}.weight'].shape[0]
        if source.layout == 'bn':
            absorb_scale(state, conv, norm, eps_mode)
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


def main() -> None:
    """Recognise, convert, verify, write."""
    args = parse_args()
    source = recognise(checks.read_checkpoint(args.source))
    if source.layout == 'gn' and not args.ws_source:
        raise SetupError(
            'The checkpoint is a ResNet with GN, and its tensors do not show '
            'whether it was trained with weight standardization. If not, '
            'nothing can keep its function: GN has no scale per filter. Add '
            '--ws-source if it is a GN+WS network; nothing was written.'
        )
    kind = args.norm or source.layout
    eps_mode = args.eps_mode or (
        'inside' if source.layout == 'bcn' else 'outside'
    )
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 64, 64, generator=generator).double()
    expected, used = run_source(source, image, args.num_groups, eps_mode, True)
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
    state = convert(source, kind, eps_mode, args.num_groups)
    bn_to_bcn = (source.layout, kind) == ('bn', 'bcn')
    run = (image, kind, args.num_groups, eps_mode)
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
    whole = run_source(source, image, args.num_groups, eps_mode, False)[0]
    real = difference(run_target(state, *run, False), whole)
    print('\n'.join(report(source, state, kind)))
    print(f'recognised: ResNet with {source.layout.upper()}')
    print(f'mapping verified: relative difference {found:.1e} in float64')
    print(f'difference to the source network: {real:.1e}')
    if source.layout == 'bn':
        print(
            'The means of plain filters cannot be kept by standardized ones'
            + (', and BCN normalizes once more' if bn_to_bcn else '')
            + ': this is a start for training, not the same network.'
        )
    folder, name = os.path.split(os.path.abspath(args.out))
    checks.check_writable(folder, 'OUT')
    models.write_together(folder, {name: lambda path: save(state, path)})
    affine = ", outer_affine='channel'" if source.layout == 'gn' else ''
    count = f', num_groups={args.num_groups}'
    norms = dict(
        gn=f"'GN'{count}", bcn=f"'ws_mm.BCN'{count}{affine}", bn="'BN'"
    )
    print(f"conv_cfg=dict(type='ws_mm.WSConv2d', eps_mode={eps_mode!r})")
    print(f'norm_cfg=dict(type={norms[kind]})')
    print(args.out)


if __name__ == '__main__':
    launch.run(main)
