"""Moving Average Batch Normalization, forward and backward."""

from typing import Any, ClassVar

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..arguments import check_count
from ..kernels.plain import at_least_float32, moved
from ..running_statistics import values_per_channel
from ._maps import (
    joined_moments,
    moments_of_maps,
    shape_per_map,
    sums_of_maps,
)
from ._norm import RunningNorm, fold, per_channel


@MODELS.register_module()
class MABN(RunningNorm):
    """Normalizes by moving averages, and its gradient by others.

    It needs centered filters before it: ``ws_mm.CenteredConv2d``.

    Formula, for each channel, in the t-th iteration of training:
        squares = mean(x^2), of the last buffer_size iterations
        var = mean(squares)                the newest one, while t is early
        ratio = clip(sqrt(var + eps) / sqrt(running_var + eps), 1/5, 5)
                                        1, while t is at most renorm_iters
        z = x / sqrt(var + eps)
        output = weight * ratio * z + bias
        running_var = (1 - momentum) * running_var + momentum * var
    In the backward, with g the gradient of ratio * z, times ratio:
        gradients = mean(g z), of the last buffer_size iterations
        dx = (g - z mean(gradients)) / sqrt(var + eps)
                                           the newest one, while t is early
    t is early while t <= buffer_size or t < warmup_iters. Evaluation divides
    by sqrt(running_var + eps).

    Convention: that of the authors' code for detection, which made the
        published Mask R-CNN: simple averages of 16 iterations of two images
        each, a running value for the rest. Their ``momentum`` is one minus
        ours. Theirs keeps averages for each process. After a gradient scaler
        changes its scale, ``gradients`` hold both scales for buffer_size
        iterations: use bfloat16, or a fixed ``loss_scale``. There are no
        second derivatives.
    State: ``weight``, ``bias``; buffers ``running_var``, ``previous_var``
        (before its last move, for a recomputed forward), ``iterations``,
        ``squares`` and, moved by the backward, ``gradients`` (rows of
        buffer_size, the newest last).

    Args: those of :class:`~ws_mm.zoo._norm.RunningNorm`, and
        momentum: share of the newest mean in running_var, in (0, 1].
        buffer_size: iterations that are averaged; the authors' hold 32 images.
        warmup_iters: iterations that normalize by their own batch.
        renorm_iters: iterations without the ratio; at least warmup_iters.

    Source: arXiv 2001.06838; github.com/megvii-model/MABN, det/.
    """

    filters = 'CenteredConv2d'  # by default, of apply_norm.py
    statistics: ClassVar = {
        'running_var': 1.0,
        'previous_var': 1.0,
        'iterations': 0.0,
        'squares': 1.0,
        'gradients': 0.0,
    }

    running_var: Tensor
    previous_var: Tensor
    iterations: Tensor
    squares: Tensor
    gradients: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.02,
        affine: bool = True,
        *,
        buffer_size: int = 16,
        warmup_iters: int = 100,
        renorm_iters: int = 1000,
        **kwargs: Any,
    ) -> None:
        check_count('buffer_size', buffer_size, 1, 'norm_cfg')
        check_count('warmup_iters', warmup_iters, 0, 'norm_cfg')
        check_count('renorm_iters', renorm_iters, warmup_iters, 'norm_cfg')
        super().__init__(num_features, eps, momentum, affine, **kwargs)
        self.warmup_iters = warmup_iters
        self.renorm_iters = renorm_iters
        widths = dict.fromkeys(('squares', 'gradients'), buffer_size)
        self.register_statistics(num_features, **self._made, widths=widths)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize by what the buffers hold after this forward moved them."""
        if not self.training:
            inverse = (self.running_var.to(x.dtype) + self.eps).rsqrt()
            return self.scaled(x * per_channel(inverse, x))
        if self.begin_forward(x):
            self._move(x)
        # Buffers alone, so that a recomputed forward finds the same.
        inverse = (self._var(self.squares) + self.eps).rsqrt()
        ratio = (self.previous_var + self.eps).rsqrt() / inverse
        begins = self.iterations <= self.renorm_iters
        ratio = torch.where(begins, 1.0, ratio.clamp(1 / 5, 5))
        output: Tensor = _MovingGradient.apply(
            x,
            *(self.weight, self.bias),
            per_channel(inverse.to(x.dtype), x),
            per_channel(ratio.to(x.dtype), x),
            self._is_early(),
            self.gradients,
        )
        return output

    def _is_early(self) -> Tensor:
        least = max(self.squares.shape[1], self.warmup_iters - 1)
        return self.iterations <= least

    def _var(self, squares: Tensor) -> Tensor:
        return torch.where(self._is_early(), squares[:, -1], squares.mean(1))

    @torch.no_grad()
    def _move(self, x: Tensor) -> None:
        newest = self.batch_statistics(x)['running_var']
        # At once, so that none moves in a channel that is not finite.
        at_once = {
            'squares': _appended(self.squares, newest),
            'iterations': self.iterations + 1,
            'previous_var': self.running_var,
        }
        self.move_statistics(at_once, 1.0)
        var = torch.where(newest.isfinite(), self._var(self.squares), newest)
        self.move_statistics(dict(running_var=var), self.momentum)

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """The mean square, which evaluation divides by."""
        x = at_least_float32(input.detach())
        mean, var = joined_moments(*moments_of_maps(x), 0)
        return dict(running_var=(var + mean.square()).flatten())

    def folded(self) -> tuple[Tensor, Tensor, nn.Module]:
        """Fold all: evaluation is a scale and a shift."""
        std = (self.running_var.double() + self.eps).sqrt()
        return fold(torch.zeros_like(std), std, self.weight, self.bias)

    def of_batch_norm(self, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        """Take the mean square of its input."""
        return dict(running_var=var + mean.square())


class _MovingGradient(torch.autograd.Function):
    """weight * ratio * z + bias, whose backward moves a mean of gradients.

    With z = inverse * x and g = grad * weight * ratio:
        dx = inverse * (g - z * mean)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        inverse: Tensor,
        ratio: Tensor,
        is_early: Tensor,
        gradients: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, inverse, ratio, is_early)
        ctx.gradients = gradients  # later calls move it, before the backward
        scale = inverse * ratio
        if weight is not None:
            scale = scale * per_channel(weight.to(x.dtype), x)
        output = x * scale
        if bias is not None:
            output += per_channel(bias.to(x.dtype), x)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, inverse, ratio, is_early = ctx.saved_tensors
        center = x.new_zeros(shape_per_map(x))
        product, total = (
            values.sum(0) for values in sums_of_maps(grad, x, center)
        )
        slope = inverse * ratio
        dweight = (product * slope).flatten()
        g_z = dweight
        if weight is not None:
            slope = slope * per_channel(weight.to(x.dtype), x)
            g_z = g_z * weight
        newest = g_z / values_per_channel(x)
        rows = ctx.gradients
        rows.copy_(moved([rows], [_appended(rows, newest)], 1.0)[0])
        mean = torch.where(is_early, newest, rows.mean(1).to(x.dtype))
        along = per_channel(mean, x) * inverse.square()
        dx = (grad * slope).addcmul_(x, along, value=-1)
        dweight = None if weight is None else dweight
        dbias = None if bias is None else total.flatten()
        return dx, dweight, dbias, *[None] * 4


def _appended(rows: Tensor, newest: Tensor) -> Tensor:
    """Rows with a new value at the end, without their first one."""
    return torch.cat([rows[:, 1:], newest.to(rows.dtype)[:, None]], 1)
