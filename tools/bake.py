"""Write a WS model as a config and a checkpoint of the host's own types.

Each standardized convolution becomes a plain one with the standardized
weight. The result needs no ws_mm and is for inference: trained further, it
is another model.
"""

import argparse
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import checks
import launch
import models
import torch
from checks import SetupError
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# Of the largest value of each output. The weights are the same bits.
TOLERANCE = 1e-6
CONVS = re.compile(r'(ws_mm\.)?WSConv[123]d')
OWN = re.compile(
    r'ws_mm(\..*)?|WSConv[123]d|BCN|SyncEstimatesHook|CheckModelHook|'
    'PretrainedGN'
)


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

    Raises:
        SetupError: something of ws_mm is left; the keys are named.
    """
    cfg = deepcopy(cfg)
    for _, node in _dicts('', cfg._cfg_dict):
        for key, value in list(node.items()):
            kind = value.get('type') if isinstance(value, dict) else None
            if CONVS.fullmatch(str(kind)):
                node[key] = None
            elif key == 'init_cfg' and OWN.fullmatch(str(kind)):
                node[key] = None
    cfg.load_from = None
    if cfg.get('custom_hooks'):
        cfg.custom_hooks = [
            hook
            for hook in cfg.custom_hooks
            if not OWN.fullmatch(str(hook['type']))
        ]
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    if isinstance(imports, str):
        imports = [imports]
    if imports:
        kept = [name for name in imports if not OWN.fullmatch(name)]
        if kept:
            cfg.custom_imports.imports = kept
        else:
            cfg.pop('custom_imports')
    left = [
        f'{key}.type = {node["type"]}'.lstrip('.')
        for key, node in _dicts('', cfg._cfg_dict)
        if OWN.fullmatch(str(node.get('type')))
        and not key.endswith('norm_cfg')
    ]
    if left:
        raise SetupError(
            f'The config still needs ws_mm: {", ".join(left)}. Only '
            'convolutions, hooks and init_cfg can be replaced.'
        )
    return cfg


def _dicts(key: str, node: Any) -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        yield key, node
        for name, value in node.items():
            yield from _dicts(f'{key}.{name}'.lstrip('.'), value)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _dicts(f'{key}.{index}', value)


def refuse_bcn(model: nn.Module) -> None:
    """Refuse estimates, which the host has no layer to hold.

    Raises:
        SetupError: the model has a BCN.
    """
    import ws_mm

    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, ws_mm.BCN)
    ]
    if names:
        raise SetupError(
            f'{len(names)} layers are BCN ({names[0]}, ...), whose estimates '
            'fold into the bias of the convolution before: the host builds '
            'convolutions before a norm without bias, so no stock config can '
            'hold it. Export the model instead (tools/export.py): ONNX and '
            'torch.export need no ws_mm. In Python, ws_mm.bake(model, inputs, '
            'fold_estimates=True) makes a model of plain layers.'
        )


def load_strictly(model: nn.Module, path: str) -> dict:
    """Load a checkpoint of exactly this model; return the whole file.

    Raises:
        SetupError: a name or a shape differs.
    """
    content = checks.read_checkpoint(path)
    weights = {
        name.removeprefix('module.'): values
        for name, values in content.get('state_dict', content).items()
    }
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
    pairs = list(zip(tree_leaves(first), tree_leaves(second), strict=True))
    worst = 0.0
    for one, two in pairs:
        if not isinstance(one, Tensor):
            continue
        if one.shape != two.shape or not two.isfinite().all():
            return float('inf')
        if one.numel():
            scale = one.abs().max().clamp_min(1e-30)
            worst = max(worst, float((one - two).abs().max() / scale))
    return worst


def main() -> None:
    """Bake, compare, and only then write."""
    args = parse_args()
    cfg = launch.load_config(args, ('model',))
    import ws_mm

    model = models.build_model(cfg)
    refuse_bcn(model)
    content = load_strictly(model, args.checkpoint)
    stock = stock_config(cfg)
    baked = ws_mm.bake(model)
    host = models.build_model(stock)
    try:
        host.load_state_dict(baked.state_dict())
    except RuntimeError as error:
        raise SetupError(
            f'The host builds another model without ws_mm: {error}'
        ) from error
    run = models.forward_of(cfg, 128)
    difference = largest_difference(run(model), run(host))
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
    for key in ('launcher', 'work_dir'):
        stock._cfg_dict.pop(key, None)
    meta = content.get('meta') or {}
    kept = {key: meta[key] for key in ('dataset_meta',) if key in meta}
    new = dict(
        meta=dict(kept, cfg=stock.pretty_text), state_dict=host.state_dict()
    )
    written = models.write_together(
        args.out_dir,
        {
            f'{stem}.py': stock.dump,
            f'{stem}.pth': lambda path: torch.save(new, path),
        },
    )
    print(f'Outputs differ by {difference:.1e} of the largest value.')
    for path in written:
        print(path)


if __name__ == '__main__':
    launch.run(main)
