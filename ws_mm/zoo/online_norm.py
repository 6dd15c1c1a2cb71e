"""Online Normalization (arXiv 1905.05894)."""

from typing import Any, ClassVar

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..arguments import check_choice, check_number
from ..kernels.plain import moved
from ..running_statistics import moments_of_both
from ._maps import affine_of_maps, moments_of_maps, sums_of_maps
from ._norm import RunningNorm, fold, per_channel

GUARDS = ('layer_scaling', 'clamp', 'none')


@MODELS.register_module()
class OnlineNorm(RunningNorm):
    """Norm by running statistics that move with every image.

    Formula, image after image t, with mean m_t and biased variance v_t of
    each channel of x_t, and p = momentum:
        y_t = (x_t - mean) / sqrt(var + eps)
        var = (1 - p) * (var + p * (m_t - mean)^2) + p * v_t
        mean = (1 - p) * mean + p * m_t
        z_t = guard(weight * y_t + bias)
    Gradient of x, image after image, from that of y, g_t; q =
    ``control_momentum``, and s_t the root in y_t:
        h_t = g_t - q * control_scale * y_t
        control_scale = control_scale + mean(h_t * y_t)
        dx_t = h_t / s_t - q * control_shift
        control_shift = control_shift + mean(dx_t)
    It is not that of the forward: on average, it is orthogonal to 1 and y,
    as the gradient of a batch norm. Guard 'layer_scaling' is z / sqrt(mean(
    z^2) + 1e-5) over all values of an image, 'clamp' cuts at ``limit``.

    Convention: as the official kernels, whose alpha_fwd is 1 - momentum and
        alpha_bkw 1 - control_momentum. The default guard is that of their
        experiments and of the paper's figures; their layer has the clamp.
        The default guard scales a weight near 0 up: with the host's
        ``zero_init_residual=True``, a branch jumps from 0 to full size in
        the first step. Set it to False, or take another guard.
    State: as its base, ``running_mean`` and ``running_var``, moved by the
        forward (before it: ``previous_mean`` and ``previous_var``, for a
        recomputed forward), and ``control_scale`` and ``control_shift``,
        moved by the backward, in the unit of the gradient: a changed loss
        scale of AMP disturbs them for about 1 / control_momentum images.
    Large activations: mean(y^2) above 2 / control_momentum, before the first
        statistics have settled, makes control_scale diverge. Keep inputs near
        unit scale, or begin with ``update_estimates``.
    Compiled: ``torch.compile`` leaves out its training forward.

    Args: those of :class:`~ws_mm.zoo._norm.RunningNorm`, and
        momentum: share of the newest image in mean and variance.
        control_momentum: share of the control in each gradient.
        guard: 'layer_scaling', 'clamp' or 'none'.
        limit: bound of the guard 'clamp'.

    Source: arXiv 1905.05894; github.com/Cerebras/online-normalization.
    """

    statistics: ClassVar = {
        'running_mean': 0.0,
        'running_var': 1.0,
        'previous_mean': 0.0,
        'previous_var': 1.0,
        'control_scale': 0.0,
        'control_shift': 0.0,
    }
    running_mean: Tensor
    running_var: Tensor
    previous_mean: Tensor
    previous_var: Tensor
    join = staticmethod(moments_of_both)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.001,
        affine: bool = True,
        *,
        control_momentum: float = 0.01,
        guard: str = 'layer_scaling',
        limit: float = 5.0,
        **kwargs: Any,
    ) -> None:
        check_number('control_momentum', control_momentum, 0, 'norm_cfg')
        check_choice('guard', guard, GUARDS, 'norm_cfg')
        check_number('limit', limit, 0, 'norm_cfg')
        super().__init__(num_features, eps, momentum, affine, **kwargs)
        self.control_momentum = control_momentum
        self.guard, self.limit = guard, limit

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize an input that has values."""
        if self.training:
            y = self._controlled(x)
        else:
            mean, var = self.running(x)[:2]
            y = (x - mean) / (var + self.eps).sqrt()
        if self.guard == 'layer_scaling':
            return self._layer_scaled(y)
        z = self.scaled(y)
        # A copy, as the backward needs y, and a ReLU may change the result.
        limit = self.limit if self.guard == 'clamp' else torch.inf
        return z.clamp(-limit, limit)

    def _layer_scaled(self, y: Tensor) -> Tensor:
        mean, var = moments_of_maps(y)
        scale, shift = torch.ones_like(mean), torch.zeros_like(mean)
        if self.weight is not None:
            scale = scale * per_channel(self.weight.to(y.dtype), y)
        if self.bias is not None:
            shift = shift + per_channel(self.bias.to(y.dtype), y)
        square = scale.square() * var + (scale * mean + shift).square()
        factor = (square.mean(1, keepdim=True) + 1e-5).rsqrt()
        zero = torch.zeros_like(mean)
        return affine_of_maps(y, zero, scale * factor, shift * factor)

    # No compiler promises to keep what a backward moves.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _controlled(self, x: Tensor) -> Tensor:
        moves = self.begin_forward(x)
        mean, var = (v.flatten(1) for v in moments_of_maps(x.detach()))
        if moves:
            self.previous_mean.copy_(self.running_mean)
            self.previous_var.copy_(self.running_var)
        now = [self.previous_mean, self.previous_var]
        used = []
        for v, m in zip(var, mean, strict=True):
            used.append(torch.stack(now))
            between = (1 - self.momentum) * (m - now[0]).square()
            now = moved(now, [m, v + between], self.momentum)
        if moves:
            self.running_mean.copy_(now[0])
            self.running_var.copy_(now[1])
        means, variances = torch.stack(used, 1)
        std = (variances + self.eps).sqrt()
        moments = per_channel(means.to(x), x), per_channel(std.to(x), x)
        control = self.control_scale, self.control_shift
        y: Tensor = _Controlled.apply(
            x, *moments, control, self.control_momentum
        )
        return y

    def folded(self) -> tuple[Tensor, Tensor, nn.Module] | None:
        """Scale and shift of evaluation, and the clamp."""
        if self.guard == 'layer_scaling':
            return None
        std = (self.running_var.double() + self.eps).sqrt()
        folded = fold(self.running_mean, std, self.weight, self.bias)
        if self.guard == 'none':
            return folded
        return *folded[:2], nn.Hardtanh(-self.limit, self.limit)


class _Controlled(torch.autograd.Function):
    """(x - mean) / std, with the controlled gradient of OnlineNorm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, std: Tensor, control: Any, q: float
    ) -> Tensor:
        y = (x * (1 / std)).sub_(mean / std)
        ctx.save_for_backward(y, std)
        ctx.control, ctx.share = control, q
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, std = ctx.saved_tensors
        # Means over each map are enough to move the control.
        of_y, var = (v.flatten(1) for v in moments_of_maps(y))
        of_yy = var + of_y.square()
        zero, size = torch.zeros_like(std), y.shape[2:].numel()
        of_gy, of_g = (v.flatten(1) / size for v in sums_of_maps(g, y, zero))
        roots = std.flatten(1)
        scale, shift = ctx.control
        used = []
        for i in range(len(g)):
            used.append(torch.stack([scale, shift]))
            part = ctx.share * scale
            of_dx = (of_g[i] - part * of_y[i]) / roots[i] - ctx.share * shift
            new = scale + of_gy[i] - part * of_yy[i], shift + of_dx
            finite = (new[0] + new[1]).isfinite()
            scale = torch.where(finite, new[0], scale)
            shift = torch.where(finite, new[1], shift)
        for buffer, value in zip(ctx.control, (scale, shift), strict=True):
            buffer.copy_(value)
        scales, shifts = (ctx.share * torch.stack(used, 1)).to(g)
        dx = (g * (1 / std)).sub_(per_channel(shifts, g))
        return dx.addcmul_(y, -per_channel(scales, g) / std), *[None] * 4
