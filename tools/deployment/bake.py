"""Write a WS model as a config and a checkpoint of the host's own types.

Each standardized convolution becomes a plain one with the standardized
weight. The result needs no ws_mm and is for inference: trained further, it
is another model.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import checkpoints, checks, files, launch, models
from support.checks import SetupError
from support.tensors import relative_error

# Of the largest value of each output. The weights are the same bits.
TOLERANCE = 1e-6
# Pixels a side of the image that is run.
SIZE = 128


def parse_args() -> argparse.Namespace:
    """Command line of baking."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file of that config')
    parser.add_argument('out_dir', help='folder for the two new files')
    launch.add_common_options(parser)
    return parser.parse_args()


def stock_config(cfg: Config) -> Config:
    """Copy a config without anything of ws_mm.

    Classes become their names. The keys that are for the run of a tool are
    left out.

    Args:
        cfg: as it was read, before the host built anything from it: it
            writes defaults of its own into what it builds from.

    Raises:
        SetupError: something of ws_mm is left; the keys are named.
    """
    from ws_mm.arguments import arguments
    from ws_mm.config_layers import registered

    content = cfg.to_dict()
    for key in ('launcher', 'work_dir'):
        content.pop(key, None)
    for _, node in _dicts('', content):
        # What configs have that name a base as ws_mm::....
        if node.get('_scope_') == 'ws_mm':
            del node['_scope_']
        # Only its convolutions were converted, which are plain again, or its
        # norms were in eval mode in training.
        if node.get('type') == 'ws_mm.Converted' and not node.get('norm'):
            if node.pop('conv', None) is not None or node.get('norm_eval'):
                node['type'] = node.pop('of')
                cls = registered(node['type'], content.get('default_scope'))
                if cls is None or 'norm_eval' not in arguments(cls):
                    node.pop('norm_eval', None)
        for key, value in node.items():
            if key == 'init_cfg' and isinstance(value, (list, tuple)):
                node[key] = [one for one in value if not _is_own(one)]
            elif _is_own(value):
                if key == 'init_cfg':
                    node[key] = None
                elif plain := _plain_conv(value):
                    node[key] = plain if plain['type'] != 'Conv2d' else None
    content['load_from'] = None
    content['resume'] = False
    if content.get('custom_hooks'):
        content['custom_hooks'] = [
            hook for hook in content['custom_hooks'] if not _is_own(hook)
        ]
    hooks = content.get('default_hooks') or {}
    for name in [name for name, hook in hooks.items() if _is_own(hook)]:
        del hooks[name]
    imports = (content.get('custom_imports') or {}).get('imports') or []
    if isinstance(imports, str):
        imports = [imports]
    if imports:
        kept = [name for name in imports if name.split('.')[0] != 'ws_mm']
        if kept:
            content['custom_imports']['imports'] = kept
        else:
            del content['custom_imports']
    left = [
        f'{key}.type = {checks.type_name(node)}'.lstrip('.')
        for key, node in _dicts('', content)
        if _is_own(node)
    ]
    if left:
        raise SetupError(
            f'The config still needs ws_mm: {", ".join(left)}. Only '
            'convolutions, hooks and init_cfg can be replaced.'
        )
    return Config(content, filename=cfg.filename)


def _is_own(node: Any) -> bool:
    """Return whether a dict of a config names a type of ws_mm."""
    import ws_mm

    name = checks.type_name(node)
    if '.' in name:
        return name.split('.')[0] == 'ws_mm'
    return isinstance({**vars(ws_mm.zoo), **vars(ws_mm)}.get(name), type)


def _plain_conv(node: dict) -> dict[str, Any] | None:
    """The host's layer for a standardized one, None for other types."""
    import ws_mm
    from ws_mm.replacement import WS_TO_PLAIN

    short = checks.short_name(node)
    kind = {**vars(ws_mm.zoo), **vars(ws_mm)}.get(short)
    if host := getattr(kind, 'host_type', None):
        own = 'eps', 'eps_mode'
        return {k: node[k] for k in node if k not in own} | dict(type=host)
    for base in getattr(kind, '__mro__', ()):
        if base in WS_TO_PLAIN:
            return dict(type=WS_TO_PLAIN[base].__name__)
    return None


def _dicts(key: str, node: Any) -> Iterator[tuple[str, dict]]:
    for name, value in checks.iter_nodes(key, node):
        if isinstance(value, dict):
            yield name, value


def refuse_bcn(model: nn.Module) -> None:
    """Reject estimates, which the host has no layer to hold.

    Raises:
        SetupError: the model has a BCN or another layer of its contract.
    """
    from ws_mm.running_statistics import RunningStatistics

    kinds = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, RunningStatistics)
    }
    for name, kind in kinds.items():
        raise SetupError(
            f'{len(kinds)} layers are {kind} ({name}, ...), whose estimates '
            'fold into the bias of the convolution before: the host builds '
            'convolutions before a norm without bias, so no stock config can '
            'hold it. Export the model instead (tools/deployment/export.py): '
            'ONNX and torch.export need no ws_mm. In Python, '
            'ws_mm.bake(model, inputs, fold_estimates=True) makes a model of '
            'plain layers.'
        )


def load_strictly(model: nn.Module, path: str) -> dict:
    """Load a checkpoint of exactly this model; return the whole file.

    Raises:
        SetupError: a name or a shape differs.
    """
    from ws_mm.checkpoint import without_prefix

    content = checkpoints.read_checkpoint(path)
    weights = without_prefix(content.get('state_dict', content))
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        lines = str(error).splitlines()
        raise SetupError(
            f'Checkpoint {path} is not of this config: '
            f'{" ".join(line.strip() for line in lines[:3])[:500]}'
        ) from error
    return content


def largest_difference(first: Any, second: Any) -> float:
    """Largest relative difference of two models' outputs."""
    from ws_mm.compat import tree_leaves

    worst = 0.0
    for one, two in zip_longest(tree_leaves(first), tree_leaves(second)):
        if not isinstance(one, Tensor) and not isinstance(two, Tensor):
            continue
        if (
            not isinstance(one, Tensor)
            or not isinstance(two, Tensor)
            or one.shape != two.shape
            or not two.isfinite().all()
        ):
            return float('inf')
        if one.numel():
            worst = max(worst, relative_error(two, one))
    return worst


def outputs_of(model: nn.Module, run: Any) -> list[Any]:
    """Run a model; what each innermost layer computed, then its outputs.

    Predictions alone may be empty, whatever led to them.
    """
    computed: list[Any] = []
    handles = [
        layer.register_forward_hook(
            lambda layer, args, output: computed.append(output)
        )
        for layer in model.modules()
        if not list(layer.children())
    ]
    outputs = run(model)
    for handle in handles:
        handle.remove()
    return [computed, outputs]


def load_into(host: nn.Module, baked: nn.Module) -> None:
    """Give the weights to the host's model, if it is the same model.

    Raises:
        SetupError: it has another layer somewhere.
    """
    pairs = zip_longest(
        baked.named_modules(), host.named_modules(), fillvalue=('', None)
    )
    for (name, ours), (other, theirs) in pairs:
        if (
            name != other
            or not isinstance(theirs, type(ours))
            or theirs.extra_repr() != ours.extra_repr()
        ):
            raise SetupError(
                f'The host builds another model without ws_mm: at '
                f'{name or other} it has {_shown(theirs)}, not {_shown(ours)}.'
                ' Nothing was written.'
            )
    try:
        host.load_state_dict(baked.state_dict())
    except RuntimeError as error:
        raise SetupError(
            f'The host builds another model without ws_mm: {error}. Nothing '
            'was written.'
        ) from error


def _shown(layer: nn.Module | None) -> str:
    if layer is None:
        return 'nothing'
    return f'{type(layer).__name__}({layer.extra_repr()})'


def text_of(cfg: Config) -> str:
    """Text of a config that loads as it is.

    Raises:
        SetupError: mmengine has no text for some value.
    """
    try:
        text = cfg.pretty_text
        same = Config.fromstring(text, '.py').to_dict() == cfg.to_dict()
    # yapf and Python raise whatever such a text makes them.
    except Exception as error:
        raise SetupError(
            'The config cannot be written as text, since it holds a value '
            f'that has none: {models.first_line(error)}. Nothing was written.'
        ) from error
    if not same:
        raise SetupError(
            'The config would load as another one once it is written as '
            'text. Nothing was written.'
        )
    return str(text)


def main() -> None:
    """Bake, compare, and only then write."""
    args = parse_args()
    cfg = launch.load_config(args, ('model',))
    import ws_mm

    model = models.build_model(cfg)
    refuse_bcn(model)
    stock = stock_config(cfg)
    content = load_strictly(model, args.checkpoint)
    baked = ws_mm.bake(model)
    host = models.build_model(stock)
    load_into(host, baked)
    try:
        run = models.forward_of(cfg, model, SIZE)
    except SetupError as error:
        raise SetupError(
            f'{error} What was baked cannot be compared, so nothing was '
            'written. In Python, ws_mm.bake(model) gives the plain model '
            'without a comparison.'
        ) from error
    difference = largest_difference(
        outputs_of(model, run), outputs_of(host, run)
    )
    if not difference <= TOLERANCE:
        raise SetupError(
            'The baked model computes something else (largest relative '
            f'difference {difference:.1e}, accepted {TOLERANCE:.0e}); nothing '
            'was written.'
        )
    stem = Path(args.config).stem
    outputs = [Path(args.out_dir, f'{stem}{end}') for end in ('.py', '.pth')]
    checks.check_apart(outputs, (args.config, args.checkpoint))
    checks.check_writable(args.out_dir, 'OUT_DIR')
    meta = content.get('meta') or {}
    kept = {key: meta[key] for key in ('dataset_meta',) if key in meta}
    text = text_of(stock)
    new = dict(meta=dict(kept, cfg=text), state_dict=host.state_dict())
    written = files.write_together(
        args.out_dir,
        {
            f'{stem}.py': lambda path: Path(path).write_text(text, 'utf-8'),
            f'{stem}.pth': lambda path: torch.save(new, path),
        },
    )
    print(f'Outputs differ by {difference:.1e} of the largest value.')
    for path in written:
        print(path)


if __name__ == '__main__':
    launch.run(main)
