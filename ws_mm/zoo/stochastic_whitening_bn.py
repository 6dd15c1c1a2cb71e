"""Stochastic Whitening Batch Normalization."""

from typing import Any, ClassVar

import torch
from mmengine.registry import MODELS
from torch import Tensor

from ..arguments import check_choice, check_share
from ._columns import columns, exact_products, maps_of
from ._norm import RunningNorm

CRITERIA = ('fro', 'kl')


@MODELS.register_module()
class StochasticWhiteningBN(RunningNorm):
    """BN, then a matrix that learns to whiten by a rule of its own.

    Formula, with a row of x for each channel, a column for each of the m
    values, and the identity I:
        z = (x - mean(x)) / sqrt(var(x) + eps)
        s = z z^T / m, and e = w s w^T - I
        'fro': d = e w s / |e|,   'kl': d = e w
        w = w - step (d + d^T) / 2, with w = I at first
        output = w z * weight + bias
    The new w is used, and is a constant to the gradient. Evaluation takes
    the running mean and var, and w.

    Convention: the authors published no code; the formula is that of
        github.com/lucanunz/Stochastic-Whitening-Batch-Normalization, made
        from the paper, with its momentum and its biased variance. Its eps is
        1e-8. The paper lowers ``step`` with the learning rate; here it is
        constant. 'fro' is the default because its w stays bounded. In
        directions without variance that of 'kl' grows by the factor
        1 + step each time, and may diverge on single images at steps far
        above the published 1e-5. The figure of that repository is of 'kl'.
    State: affine per channel; ``running_mean``, ``running_var`` (C,);
        ``whitening``, w, (C, C). ``update_estimates`` leaves w as it is.
    Cost: an update is 6 C^3 operations, whatever the size of the map, and w
        has C^2 values: 52e9 and 16 MiB at C = 2048. There are no groups.
    Baked: it mixes channels, so ``bake`` does not fold it.

    Args: those of :class:`~ws_mm.zoo._norm.RunningNorm`, and
        criterion: rule of w, 'fro' (Frobenius norm) or 'kl' (relative
            gradient of the Kullback-Leibler divergence).
        step: step size of the rule, in (0, 1].

    Source: arXiv 2106.04413.
    """

    statistics: ClassVar = {
        'running_mean': 0.0,
        'running_var': 1.0,
        'whitening': torch.nn.init.eye_,
    }
    running_mean: Tensor
    running_var: Tensor
    whitening: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.05,
        affine: bool = True,
        *,
        criterion: str = 'fro',
        step: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        check_choice('criterion', criterion, CRITERIA, 'norm_cfg')
        check_share('step', step, 'norm_cfg')
        super().__init__(num_features, eps, momentum, affine, **kwargs)
        self.step, self.criterion = step, criterion
        widths = {'whitening': num_features}
        self.register_statistics(num_features, **self._made, widths=widths)

    # ``estimating``: training uses w, of which all ranks need one.

    def normalize(self, x: Tensor) -> Tensor:
        """Standardize, by the batch in training, and whiten."""
        moves = self.begin_forward(x)
        rows = columns(x)
        if self.training:
            self.check_values(x)
            mean = rows.mean(1)
            var = (rows - mean[:, None]).square().mean(1)
        else:
            mean = self.running_mean.to(x.dtype)
            var = self.running_var.to(x.dtype)
        z = (rows - mean[:, None]) * (var + self.eps).rsqrt()[:, None]
        with exact_products(x):
            if moves:
                batch = dict(running_mean=mean, running_var=var)
                self.move_statistics(batch, self.momentum)
                self._move_whitening(z)
            # A copy: a later call may move it before the backward.
            whitened = self.whitening.to(x.dtype, copy=True) @ z
        return self.scaled(maps_of(whitened, x))

    @torch.no_grad()
    def _move_whitening(self, z: Tensor) -> None:
        w = self.whitening.to(z.dtype)
        applied = w @ (z @ z.T / z.shape[1])
        error = applied @ w.T
        error.diagonal().sub_(1)
        if self.criterion == 'kl':
            rule = error @ w
        else:
            tiny = torch.finfo(z.dtype).tiny
            rule = error @ applied / error.norm().clamp_min(tiny)
        target = w - (rule + rule.T) / 2
        self.move_statistics({'whitening': target}, self.step)
