"""Sandwich Batch Normalization."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..arguments import check_count
from ._batch import BatchStatistics
from ._norm import per_channel


@MODELS.register_module()
class SandwichBN(BatchStatistics):
    """BN with an affine that all conditions share, then one of each.

    Formula, for images of condition k (class, domain, ...):
        shared = BN(input) * weight + bias
        output = shared * condition_weight[k] + condition_bias[k]

    The condition is 0 until :func:`set_condition` names another. With one
    condition it is BN with one more affine.

    Convention: all conditions share the statistics, as in the authors' GANs.
        These draw the scales of conditions from N(1, 0.02); ours start at 1,
        so that the layer starts as the BN that it replaces.
    State: as its base; ``condition_weight``, ``condition_bias``, one row per
        condition. The condition itself is in no checkpoint.

    Args: those of :class:`~ws_mm.zoo._batch.BatchStatistics`, and
        affine: whether both affines are learned.
        num_conditions: number of conditions.

    Source: arXiv 2102.11382; VITA-Group/Sandwich-Batch-Normalization.
    """

    condition_weight: nn.Parameter
    condition_bias: nn.Parameter

    def __init__(
        self, *args: Any, num_conditions: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_count('num_conditions', num_conditions, 1, 'norm_cfg')
        self.num_conditions = num_conditions
        self.condition: int | Tensor = 0
        shape, exists = (num_conditions, self.num_features), self.affine
        self.add_parameter('condition_weight', 1.0, *shape, exists=exists)
        self.add_parameter('condition_bias', 0.0, *shape, exists=exists)

    def both_affines(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of both in one, (C,) or (N, C)."""
        weight = self.condition_weight[self.condition]
        bias = self.condition_bias[self.condition]
        return weight * self.weight, weight * self.bias + bias

    def normalize(self, x: Tensor) -> Tensor:
        """BN with the affine of the condition, or of each image's."""
        if not self.affine:
            return self.batch_norm(x, None, None)
        scale, shift = self.both_affines()
        if scale.dim() == 1:
            return self.batch_norm(x, scale, shift)
        if len(scale) != len(x):
            raise ValueError(
                f'set_condition gave {len(scale)} conditions, and SandwichBN '
                f'got {len(x)} images: give one for each, or one number'
            )
        y = self.batch_norm(x, None, None)
        y = y * per_channel(scale.to(x.dtype), x)
        return y + per_channel(shift.to(x.dtype), x)

    def folded(self) -> tuple[Tensor, Tensor, nn.Module] | None:
        """Scale and shift of the evaluation, if there is one condition."""
        if not self.affine:
            return super().folded()
        scale, shift = self.both_affines()
        return self.folded_with(scale, shift) if scale.dim() == 1 else None


def set_condition(model: nn.Module, condition: int | Tensor) -> None:
    """Set the condition of all :class:`SandwichBN` layers of a model.

    It holds until the next call. Activation checkpointing runs layers again
    in the backward: call it after that.

    Args:
        model: any model.
        condition: index of the condition, or a tensor of one per image.
    """
    layers = [m for m in model.modules() if isinstance(m, SandwichBN)]
    indices = torch.as_tensor(condition)
    for layer in layers:
        if indices.lt(0).any() or indices.ge(layer.num_conditions).any():
            raise ValueError(
                f'condition={condition} must be in [0, '
                f'{layer.num_conditions}): SandwichBN has as many conditions '
                'as norm_cfg=dict(num_conditions=...) says'
            )
    for layer in layers:
        layer.condition = condition
