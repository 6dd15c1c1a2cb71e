"""Convert a ResNet or ResNeXt checkpoint for a WS backbone, and verify it.

Reads torchvision's names, which timm's ResNets share: the authors' GN+WS and
BCN+WS releases, timm's StdConv2d, plain BN and GN networks; and mmdet's names
(gn1): open-mmlab://jhu/*. A prefix before all of them, such as 'module.' or
'module.encoder_q.', is removed. Rejects networks that no ResNet of the hosts
can hold, with the reason: BiT, ResNetV2, NFNet. Writes OpenMMLab's names.
Every tensor is listed, and both networks run in float64 on a random image
before anything is written.

The result is exact for networks with standardized filters that keep their
norm. timm's StdConv2d divides by the biased variance: a constant per layer
goes into the filters, and the printed conv_cfg holds the rest. GN to BCN is
exact but for eps. These are not exact and need --approximate: plain filters,
because a standardized filter has no mean (a BN or BCN takes their scale, a GN
keeps only that of a group); BN to BCN, which normalizes once more; BN to GN,
which normalizes by the image.
"""

import argparse
import math
import os
import re
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model_converters.resnet import (
    KNOWN,
    NORM_EPS,
    TIMM_EPS,
    WS_EPS,
    Filters,
    Source,
    State,
    held_filters,
    recognise,
    run_source,
    run_target,
    standardized,
    timm_scale,
    used_filters,
)
from support import checkpoints, checks, files, launch
from support.checks import SetupError
from support.layer_checks import divisors
from support.tensors import relative_error

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
        type=launch.positive,
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
        '--prefix',
        help='prefix of the names to convert, such as module.encoder_q., '
        'where the file holds several networks; tensors without it are left '
        'behind',
    )
    parser.add_argument(
        '--approximate',
        action='store_true',
        help='write a start for training, too, that computes something else '
        'than the checkpoint; how far off it is, is printed',
    )
    return parser.parse_args()


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
        filters: Formulas of its filters.
        num_groups: Groups of new BCN layers.
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
    """Choose the formula of the filters from options and checkpoint.

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
    """Reject what computes something else, unless it was asked for.

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


def check_groups(source: Source, groups: int) -> None:
    """Reject groups that do not divide the channels of all norms.

    Raises:
        SetupError: they do not.
    """
    channels = {
        len(filters)
        for name, filters in source.state.items()
        if KNOWN.fullmatch(name)['conv']
    }
    if any(count % groups for count in channels):
        raise SetupError(
            f'--num-groups {groups}: the GN layers of this network have '
            f'{", ".join(map(str, sorted(channels)))} channels. Give one of '
            f'{divisors(math.gcd(*channels))}. Nothing was written.'
        )


def losses(source: Source, kind: str, filters: Filters) -> list[str]:
    """List in words what the converted network loses."""
    lost = []
    if filters.formula == 'plain':
        lost.append('the means of plain filters')
        if source.layout == 'gn' or kind == 'gn':
            lost.append('their scale within a group of GN')
    if (source.layout, kind) == ('bn', 'bcn'):
        lost.append('the part that the second normalization of BCN removes')
    if (source.layout, kind) == ('bn', 'gn'):
        lost.append(
            'the statistics of the data, since GN uses those of the image'
        )
    return lost


def main() -> None:
    """Recognise, convert, verify, write."""
    args = parse_args()
    if not args.out.endswith(('.pth', '.safetensors')):
        raise SetupError(
            f'OUT {args.out}: a checkpoint is called NAME.pth or '
            'NAME.safetensors.'
        )
    source = recognise(checkpoints.read_checkpoint(args.source), args.prefix)
    kind = args.norm or source.layout
    if (source.layout, kind) not in TOLERANCE:
        legal = [new for old, new in TOLERANCE if old == source.layout]
        raise SetupError(
            f'--norm {kind}: the checkpoint has {source.layout.upper()} '
            f'layers, which become {" or ".join(legal)}.'
        )
    if 'gn' in (source.layout, kind):
        check_groups(source, args.num_groups)
    filters = choose_filters(args, source.layout)
    generator = torch.Generator().manual_seed(0)
    channels = source.state['conv1.weight'].shape[1]
    image = torch.randn(2, channels, 64, 64, generator=generator).double()
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
    found = relative_error(run_target(state, *run, bn_to_bcn), expected)
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
    real = relative_error(run_target(state, *run, False), whole)
    refuse_other_function(args, source, filters, real)
    lines = report(source, state, kind)
    counts = Counter(line.split()[0] for line in lines)
    print('\n'.join(lines))
    print(
        f'recognised: ResNet with {source.layout.upper()}; tensors '
        + ', '.join(f'{kind}: {count}' for kind, count in counts.items())
    )
    print(f'mapping verified: relative difference {found:.1e} in float64')
    print(
        f'difference to the source network: {real:.1e} of the largest output'
    )
    if real > SAME:
        print(
            f'Not kept: {"; ".join(losses(source, kind, filters))}. No '
            'mapping can keep this. It is a start for training, not the same '
            'network.'
        )
    checks.check_apart([Path(args.out)], (args.source,))
    folder, name = os.path.split(os.path.abspath(args.out))
    checks.check_writable(folder, 'OUT')
    files.write_together(folder, {name: lambda path: save(state, path)})
    affine = ", outer_affine='channel'" if source.layout == 'gn' else ''
    eps = '' if filters.eps == WS_EPS else f', eps={filters.eps}'
    groups = args.num_groups
    if source.layout == 'bcn':  # its outer affine has one entry per group
        groups = len(state['bn1.weight'])
    count = f', num_groups={groups}'
    norms = dict(
        gn=f"'GN'{count}", bcn=f"'ws_mm.BCN'{count}{affine}", bn="'BN'"
    )
    mode = f'eps_mode={filters.eps_mode!r}'
    print(f"conv_cfg=dict(type='ws_mm.WSConv2d', {mode}{eps})")
    print(f'norm_cfg=dict(type={norms[kind]})')
    print(args.out)


if __name__ == '__main__':
    launch.run(main)
