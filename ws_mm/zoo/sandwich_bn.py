"""Sandwich Batch Normalization."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ._batch import BatchStatistics


@MODELS.register_module()
class SandwichBN(BatchStatistics):
    """BN with an affine that all conditions share, then one of each.

    Formula, for images of condition k (class, domain, ...):
        shared = BN(input) * weight + bias
        output = shared * condition_weight[k] + condition_bias[k]

    A config has no conditions: the condition is 0 until
    :func:`set_condition` names another. With one condition it is BN with
    one more affine.

    Convention: all conditions share the statistics, as in the authors' GANs;
        their code for architecture search and adversarial training keeps
        some for each. It draws the scales of conditions from N(1, 0.02),
        ours start at 1: the layer starts as the BN that it replaces.
    State: ``weight``, ``bias``; ``condition_weight``, ``condition_bias``,
        one row per condition; ``running_mean``, ``running_var``. The
        condition itself is an attribute and in no checkpoint.

    Args:
        num_features: channels of the input.
        eps: constant added to the variance.
        momentum: share of the newest batch in the running values.
        affine: whether both affines are learned.
        num_conditions: number of conditions.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has an illegal value, training sees one value
            per channel, or there are more or fewer conditions than images.

    Source: arXiv 2102.11382; VITA-Group/Sandwich-Batch-Normalization.
    """

    condition_weight: nn.Parameter
    condition_bias: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        num_conditions: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, unknown, device, dtype
        )
        if num_conditions < 1:
            raise ValueError(
                f'num_conditions={num_conditions} must be at least 1 '
                '(norm_cfg=dict(num_conditions=...))'
            )
        self.num_conditions = num_conditions
        self.condition: int | Tensor = 0
        for name in ('condition_weight', 'condition_bias'):
            values = torch.empty(
                num_conditions, num_features, device=device, dtype=dtype
            )
            self.register_parameter(
                name, nn.Parameter(values) if affine else None
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Restore both affines and the statistics."""
        super().reset_parameters()
        if getattr(self, 'condition_bias', None) is not None:
            nn.init.ones_(self.condition_weight)
            nn.init.zeros_(self.condition_bias)

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
        shape = (*scale.shape, *[1] * (x.dim() - 2))
        y = self.batch_norm(x, None, None)
        return y * scale.to(x.dtype).view(shape) + shift.to(x.dtype).view(
            shape
        )

    def folded(self) -> tuple[Tensor, Tensor, nn.Module] | None:
        """Scale and shift of the evaluation, if there is one condition."""
        if not self.affine:
            return self.fold(None, None)
        scale, shift = self.both_affines()
        return self.fold(scale, shift) if scale.dim() == 1 else None

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return f'{super().extra_repr()}, num_conditions={self.num_conditions}'


def set_condition(model: nn.Module, condition: int | Tensor) -> None:
    """Set the condition of all :class:`SandwichBN` layers of a model.

    It holds until the next call. Activation checkpointing runs layers again
    in the backward: call it after that.

    Args:
        model: any model.
        condition: index of the condition, or a tensor of one per image.

    Raises:
        ValueError: an index is not below ``num_conditions`` of a layer.
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
