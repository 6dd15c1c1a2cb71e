"""Checkpoints: read without running code, and into layouts that differ."""

import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner.checkpoint import get_torch_safe_globals
from torch import nn

# The authors' README names the inner normalization bn, their code pbn.
AUTHORS_INNER = ('pbn.', 'bn.')
CONVERTER = 'python tools/convert_checkpoint.py OLD NEW --norm bcn'
# Version of the state of a standardized convolution. torch writes it into
# every state dict, so that its filters can be told from plain ones.
STANDARDIZED = 2
FORCE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'


def allow_host_objects() -> None:
    """Let torch read what the host's own checkpoints hold besides tensors."""
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    torch.serialization.add_safe_globals(get_torch_safe_globals() + dtypes)


@contextmanager
def weights_only() -> Iterator[None]:
    """Run no code from a file that is loaded meanwhile.

    The host tries ``weights_only=True`` and, where a file holds more than
    weights, loads it again with code and all. Here it cannot.
    """
    before = os.environ.get(FORCE)
    os.environ[FORCE] = '1'
    allow_host_objects()
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


@CheckpointLoader.register_scheme(  # type: ignore[untyped-decorator]
    prefixes=r'.*\.safetensors$', force=True
)
def load_from_safetensors(
    filename: str, map_location: Any = None
) -> dict[str, Any]:
    """Read a .safetensors file, wherever the host takes a checkpoint.

    Args:
        filename: a local file.
        map_location: device of the tensors.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            f'{filename} needs safetensors. Install it with: pip install '
            'safetensors'
        ) from error
    state: OrderedDict[str, Any] = OrderedDict()
    with safe_open(filename, 'pt', device='cpu') as file:
        for name in file.keys():
            state[name] = file.get_tensor(name)
            if map_location is not None:
                state[name] = state[name].to(map_location)
        header = file.metadata() or {}
    if 'ws_mm' in header:
        mark_standardized(state)
    return dict(state_dict=state)


def mark_standardized(state: OrderedDict[str, Any]) -> None:
    """Say in a state dict that its filters are those of WS convolutions."""
    state._metadata = OrderedDict(  # type: ignore[attr-defined]
        (name.removesuffix('.weight'), dict(version=STANDARDIZED))
        for name, values in state.items()
        if name.endswith('.weight') and values.dim() > 2
    )


def to_native_layout(
    state_dict: dict[str, Any],
    prefix: str,
    num_features: int,
    outer_affine: str,
    num_groups: int | None = None,
) -> str:
    """Rename, in place, what a checkpoint holds for one BCN layer.

    ======================================  ============================
    layout under prefix                     what happens
    ======================================  ============================
    ``bn_weight``, ``running_mean``, ...    BCN's own: untouched; an outer
                                            affine per group is repeated
                                            per channel, else refused
    ``pbn.weight``, ``weight`` (1, G, 1)    the authors' BCN: mapped
    ``weight``, ``bias`` alone              GN: exact, with estimates
                                            (0, 1), if the outer affine
                                            is per channel, else refused
    ``weight``, ``running_mean``, ...       BN: refused
    ======================================  ============================

    Args:
        state_dict: the checkpoint.
        prefix: what the names of the layer's entries begin with.
        num_features: of the layer.
        outer_affine: of the layer.
        num_groups: of the layer; None is not compared.

    Returns:
        What was mapped, in words; '' where nothing was.

    Raises:
        ValueError: the entries mean something else than the layer does.
    """
    name = prefix[:-1]

    def has(name: str) -> bool:
        return prefix + name in state_dict

    for inner in AUTHORS_INNER:
        if has(inner + 'running_mean'):
            _map_authors(state_dict, prefix + inner, prefix)
            _fit_outer(
                state_dict, prefix, num_features, outer_affine, num_groups
            )
            return (
                f"{name}: the authors' BCN: weight, bias -> weight, bias "
                f'({outer_affine}); {inner}weight, {inner}bias -> bn_weight, '
                f'bn_bias; {inner}running_mean, {inner}running_var -> '
                'running_mean, running_var'
            )
    if has('bn_weight'):
        return _fit_outer(
            state_dict, prefix, num_features, outer_affine, num_groups
        )
    if not has('weight'):
        return ''
    if has('running_mean'):
        raise ValueError(
            f'{name}: the checkpoint holds a plain BatchNorm here, '
            'and BCN normalizes differently: loaded, its affine would mean '
            'something else. Use a BCN or a GN checkpoint, train from '
            'scratch (backbone.init_cfg=None, load_from=None), or make a '
            f'start for training of a ResNet with: {CONVERTER} --approximate'
        )
    if outer_affine != 'channel':
        raise ValueError(
            f'{name}: the checkpoint holds a GroupNorm here, whose '
            'affine is per channel, and this BCN has one per group. Set '
            "norm_cfg=dict(outer_affine='channel') to load it exactly, or "
            f'convert a ResNet, verified, with: {CONVERTER} --ws-source'
        )
    ones = torch.ones(num_features)
    for name, values in (
        ('bn_weight', ones),
        ('bn_bias', 0 * ones),
        ('running_mean', 0 * ones),
        ('running_var', ones),
    ):
        state_dict[prefix + name] = values.clone()
    return (
        f'{prefix[:-1]}: GroupNorm: weight, bias -> weight, bias; created '
        'bn_weight 1, bn_bias 0, running_mean 0, running_var 1'
    )


def _fit_outer(
    state_dict: dict[str, Any],
    prefix: str,
    num_features: int,
    outer_affine: str,
    num_groups: int | None,
) -> str:
    """Repeat an outer affine per group where it is kept per channel."""
    outer = state_dict.get(f'{prefix}weight')
    inner = state_dict[f'{prefix}bn_weight']
    if outer is None or inner.numel() != num_features:
        return ''  # Other channels: torch and the host say it.
    found = outer.numel()
    per_channel = outer_affine == 'channel'
    if found == (num_features if per_channel else num_groups or found):
        return ''
    if found == num_features:
        mend = "norm_cfg=dict(outer_affine='channel')"
        what = 'an outer affine per channel, this BCN one per group'
    elif num_groups not in (None, found):
        mend = f'norm_cfg=dict(num_groups={found})'
        what = f'{found} groups here, this BCN {num_groups}'
    else:
        for name in ('weight', 'bias'):
            state_dict[prefix + name] = state_dict[
                prefix + name
            ].repeat_interleave(num_features // found)
        return (
            f'{prefix[:-1]}: BCN: weight, bias of {found} groups -> weight, '
            f'bias of {num_features} channels'
        )
    raise ValueError(
        f'{prefix[:-1]}: the checkpoint has {what}: it would compute '
        f'something else. Set {mend}'
    )


def refuse_other_name(prefix: str, unexpected: list[str]) -> None:
    """Refuse a norm that the checkpoint has under the name of a GroupNorm.

    Args:
        prefix: of a BCN layer for which the checkpoint has nothing.
        unexpected: names that its parents have no place for.

    Raises:
        ValueError: ``gn1`` is there for ``bn1``.
    """
    above, dot, name = prefix[:-1].rpartition('.')
    other = f'{above}{dot}{re.sub("^bn", "gn", name)}'
    if other == prefix[:-1] or f'{other}.weight' not in unexpected:
        return
    raise ValueError(
        f'{prefix[:-1]}: the checkpoint holds a GroupNorm named {other}; '
        'loaded by name, every BCN would stay as it was initialised. Use '
        "init_cfg=dict(type='ws_mm.PretrainedGN', checkpoint=...) with "
        "norm_cfg=dict(type='ws_mm.BCN', outer_affine='channel'), or, for a "
        f"ResNet with torchvision's names, {CONVERTER} --ws-source"
    )


def report(message: str) -> None:
    """Log what went where."""
    if message:
        print_log(message, logger='current')


def _map_authors(state_dict: dict[str, Any], inner: str, prefix: str) -> None:
    for name in ('weight', 'bias'):
        state_dict[prefix + name] = state_dict[prefix + name].flatten()
        state_dict[f'{prefix}bn_{name}'] = state_dict.pop(inner + name)
    for name in ('running_mean', 'running_var'):
        state_dict[prefix + name] = state_dict.pop(inner + name)
    for name in ('num_batches_tracked', 'estbn_moving_speed'):
        state_dict.pop(inner + name, None)


def from_batch_norm(
    state_dict: dict[str, Any], prefix: str, outer: torch.Tensor | None
) -> None:
    """Make a BCN of a BatchNorm, in place; another function.

    The running statistics become the estimates, the affine the inner one.
    The normalization over groups that follows is new, with outer affine
    (1, 0).

    Args:
        state_dict: holds the entries of the BatchNorm.
        prefix: what the names of these entries begin with.
        outer: a tensor like the scale of the outer affine; None for a layer
            without affines.
    """
    for name in ('weight', 'bias'):
        if prefix + name in state_dict:
            state_dict[f'{prefix}bn_{name}'] = state_dict.pop(prefix + name)
    if outer is not None:
        mean = state_dict[f'{prefix}running_mean']
        # A BatchNorm without an affine becomes a BCN with one.
        state_dict.setdefault(f'{prefix}bn_weight', torch.ones_like(mean))
        state_dict.setdefault(f'{prefix}bn_bias', torch.zeros_like(mean))
        state_dict[f'{prefix}weight'] = torch.ones_like(outer)
        state_dict[f'{prefix}bias'] = torch.zeros_like(outer)
    state_dict.pop(f'{prefix}num_batches_tracked', None)


@WEIGHT_INITIALIZERS.register_module()
class PretrainedGN(PretrainedInit):
    """Start a BCN model from a GroupNorm checkpoint, exactly.

    For checkpoints of OpenMMLab's names (``gn1``, ``layer1.0.gn1``), such as
    ``open-mmlab://jhu/resnext101_32x4d_gn_ws``. The model's BCN layers need
    ``outer_affine='channel'``; their estimates start at (0, 1), where BCN
    equals the GroupNorm of the checkpoint.

    Args:
        checkpoint: path or URL, as in ``init_cfg=dict(type='Pretrained')``.
        map_location: device that the tensors are loaded to.
    """

    def __init__(self, checkpoint: str, map_location: str = 'cpu') -> None:
        super().__init__(checkpoint, map_location=map_location)

    def __call__(self, module: nn.Module) -> None:
        """Load the checkpoint into ``module``."""
        # The host initialises the parts after any type but 'Pretrained',
        # which would overwrite what is loaded.
        for part in module.children():
            if hasattr(part, 'init_weights') and not getattr(
                part, 'is_init', False
            ):
                part.init_weights()  # type: ignore[operator]
                part.is_init = True  # type: ignore[assignment]
        with weights_only():
            load_checkpoint(
                module,
                self.checkpoint,
                map_location=self.map_location,
                logger='current',
                revise_keys=[(r'^module\.', ''), (r'\bgn(\d*)\b', r'bn\1')],
            )
