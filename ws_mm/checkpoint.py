"""Known checkpoint layouts of a normalization, read into that of BCN."""

from typing import Any

import torch
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import load_checkpoint
from torch import nn

# The authors' README names the inner normalization bn, their code pbn.
AUTHORS_INNER = ('pbn.', 'bn.')


def to_native_layout(
    state_dict: dict[str, Any],
    prefix: str,
    num_features: int,
    outer_affine: str,
) -> None:
    """Rename, in place, what a checkpoint holds for one BCN layer.

    ======================================  ============================
    layout under prefix                     what happens
    ======================================  ============================
    ``bn_weight``, ``running_mean``, ...    BCN's own: untouched
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

    Raises:
        ValueError: the entries mean something else than the layer does.
    """

    def has(name: str) -> bool:
        return prefix + name in state_dict

    for inner in AUTHORS_INNER:
        if has(inner + 'running_mean'):
            _map_authors(
                state_dict, prefix + inner, prefix, num_features, outer_affine
            )
            return
    if has('bn_weight') or not has('weight'):
        return
    if has('running_mean'):
        raise ValueError(
            f'{prefix[:-1]}: the checkpoint holds a plain BatchNorm here, '
            'and BCN normalizes differently: loaded, its affine would mean '
            'something else. Use a BCN or a GN checkpoint, or train from '
            'scratch (backbone.init_cfg=None, load_from=None)'
        )
    if outer_affine != 'channel':
        raise ValueError(
            f'{prefix[:-1]}: the checkpoint holds a GroupNorm here, whose '
            'affine is per channel, and this BCN has one per group. Set '
            "norm_cfg=dict(outer_affine='channel') to load it exactly"
        )
    ones = torch.ones(num_features)
    for name, values in (
        ('bn_weight', ones),
        ('bn_bias', 0 * ones),
        ('running_mean', 0 * ones),
        ('running_var', ones),
    ):
        state_dict[prefix + name] = values.clone()


def _map_authors(
    state_dict: dict[str, Any],
    inner: str,
    prefix: str,
    num_features: int,
    outer_affine: str,
) -> None:
    for name in ('weight', 'bias'):
        outer = state_dict[prefix + name].flatten()
        if outer_affine == 'channel':
            outer = outer.repeat_interleave(num_features // outer.numel())
        state_dict[prefix + name] = outer
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
        load_checkpoint(
            module,
            self.checkpoint,
            map_location=self.map_location,
            logger='current',
            revise_keys=[(r'^module\.', ''), (r'\bgn(\d+)\b', r'bn\1')],
        )
