"""Cross-Iteration Batch Normalization (arXiv 2002.05712)."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from .. import compat
from ..arguments import check_count, check_momentum
from ..functional import swap_channels
from ..running_statistics import (
    RunningStatistics,
    measured_moments,
    report_once,
    values_per_channel,
)
from ._norm import Norm, over_channels, per_channel

# What may lie between a convolution and its norm: casts, copies, hooks.
PASSED = ('ToCopyBackward0', 'CloneBackward0', 'BackwardHookFunctionBackward')


@MODELS.register_module()
class CrossIterationBN(RunningStatistics, Norm):
    """Batch norm by the statistics of the last iterations.

    Formula, with w the weight of the convolution before it, and a and b the
    mean and the mean square of the batch s iterations ago, s < window:
        a_s(w) = a_s + da_s/dw * (w - w_s)
        b_s(w) = max(b_s + db_s/dw * (w - w_s), a_s(w)^2)
        mean = mean over s of a_s(w)
        var = mean over s of b_s(w) - mean^2
        y = weight * (x - mean) / sqrt(var + eps) + bias
    Gradients pass through this iteration's a and b alone.

    Convention: the formula of the paper. The official code differs where
        the extrapolated b is below a^2: it leaves this s out, where the
        paper takes the maximum. It adds eps to the root (1e-5 there). Both
        keep running values of each batch, with unbiased variance, as
        ``nn.BatchNorm2d``, and normalize by the batch during burn-in, where
        its variance is unbiased, too. The official backbone hands w to the
        norm. Here it is found in the autograd graph: w is what the
        convolution's weight is made of, the parameter of a plain or of a
        standardized one. Bias and earlier layers count as constant, as
        theirs. Nothing may lie between the two layers, a cast excepted.
    No weight: without gradients, after another layer or a frozen
        convolution, in ``torch.compile``, and with a reentrant activation
        checkpoint (mmdet's ``with_cp``), no weight is found. The layer is
        then a plain batch norm, a warning says so once, and the window
        begins anew.
    Iterations: every training forward is one. With gradient accumulation
        the window covers fewer optimizer steps; a head that pyramid levels
        share mixes their statistics: use GN there.
    State: as its base, ``running_mean``, ``running_var`` and
        ``num_forwards``. The window, twice the size of w for each former
        iteration, is in copies and pickles, not in the state dict: after a
        resume it fills again in ``window`` iterations. A forward costs two
        more gradients of w.

    Args:
        num_features: channels of the input.
        eps: constant added to the variance.
        momentum: share of the newest batch in the running values.
        affine: whether scale and shift are learned.
        window: number of iterations, this one included.
        burn_in: training forwards of plain batch norm at the start. The
            published COCO runs have those of 8 of 12 epochs.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.
        **unknown: none; a misspelt argument is rejected by name.

    Raises:
        ValueError: an argument has an illegal value; in training, one value
            per channel.

    Source: arXiv 2002.05712; github.com/Howal/Cross-iterationBatchNorm.
    """

    statistics: ClassVar = {'running_mean': 0.0, 'running_var': 1.0}

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        window: int = 4,
        burn_in: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        check_momentum(momentum, 'norm_cfg')
        check_count('window', window, 1, 'norm_cfg')
        check_count('burn_in', burn_in, 0, 'norm_cfg')
        super().__init__(num_features, eps, affine, unknown, device, dtype)
        self.momentum, self.window, self.burn_in = momentum, window, burn_in
        self.register_statistics(num_features, device, dtype)
        count = torch.zeros((), dtype=torch.long, device=device)
        self.register_buffer('num_forwards', count)
        self._forget()

    def reset_parameters(self) -> None:
        """Also begin burn-in and window anew."""
        super().reset_parameters()
        if 'num_forwards' in self._buffers:
            self.num_forwards.zero_()
            self._forget()

    def _forget(self) -> None:
        # The newest is the batch of the last forward, for its recomputation.
        self._pasts: list[Past] = []
        # num_forwards, as reading the device each time would wait for it.
        self._forwards: int | None = None

    @property
    def estimating(self) -> bool:
        """Return False: the running values serve evaluation alone."""
        return False

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize an input that has values."""
        if self.training:
            self.check_batch(x)
            mean, var = self._over_iterations(x)
        else:
            mean, var = (
                v.to(x) for v in (self.running_mean, self.running_var)
            )
        std = (var + self.eps).sqrt()
        return self.scaled((x - per_channel(mean, x)) / per_channel(std, x))

    def _over_iterations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moves = self.begin_forward(x)
        var, mean = torch.var_mean(x, over_channels(x), correction=0)
        leaves, groups = weight_of(x)
        weight = rows(leaves, groups).to(x.dtype) if leaves else mean[:, None]
        if moves:
            count = values_per_channel(x)
            unbiased = var.detach() * (count / (count - 1))
            batch = dict(running_mean=mean.detach(), running_var=unbiased)
            self.move_statistics(batch, self.momentum)
            if not leaves:
                _report_no_weight(type(self).__name__)
                self._pasts = []
            elif not self._burns_in():
                scale = count**0.5  # else float16 rounds gradients to 0
                seed = torch.full_like(mean, scale)
                dmean, dvar = (
                    rows(torch.autograd.grad(v, leaves, seed, True), groups)
                    for v in (mean, var)
                )
                new = Past.of(mean, var, dmean / scale, dvar / scale, weight)
                old = [p for p in self._pasts if p.fits(weight)]
                self._pasts = [new, *old][: self.window]
        return averaged(mean, var, self._pasts[1:], weight)

    def _burns_in(self) -> bool:
        """Count a forward; return whether it is one of the burn-in."""
        if self._forwards is None:
            self._forwards = int(self.num_forwards)
        self._forwards += 1
        self.num_forwards.add_(1)
        return self._forwards <= self.burn_in

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._forwards = None

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """Mean and unbiased variance of a batch."""
        return measured_moments(input, False, unbiased=True)[1]

    def folded(self) -> tuple[Tensor, Tensor, nn.Module]:
        """Scale and shift of evaluation."""
        std = (self.running_var.double() + self.eps).sqrt()
        return *self.affine_after(self.running_mean, std), nn.Identity()


class Past(NamedTuple):
    """Statistics of a former iteration as functions of the weight now, w.

    mean(w) = mean_at_0 + dmean * w
    var(w) = max(var_at_0 + dvar * w - (mean(w) - mean)^2, 0)
    That is the formula of the layer, with var = b - a^2 in place of b.
    """

    counts: Tensor  # 1 in channels that are finite, else 0
    mean: Tensor
    mean_at_0: Tensor
    var_at_0: Tensor
    dmean: Tensor
    dvar: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        mean: Tensor,
        var: Tensor,
        dmean: Tensor,
        dvar: Tensor,
        weight: Tensor,
    ) -> 'Past':
        """That of an iteration and its weight."""
        at_0 = mean - (dmean * weight).sum(1), var - (dvar * weight).sum(1)
        finite = (at_0[0] + at_0[1]).isfinite()
        values = [mean.detach(), *at_0, dmean, dvar]
        return cls(
            finite.to(mean.dtype),
            *(v.T.where(finite, v.new_zeros(())).T for v in values),
        )

    def fits(self, weight: Tensor) -> bool:
        """Return whether it is of a weight of this shape and device."""
        own = self.dmean
        return own.shape == weight.shape and own.device == weight.device


def averaged(
    mean: Tensor, var: Tensor, pasts: list[Past], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance over this iteration and former ones."""
    if not pasts:
        return mean, var
    counts, means, variances = [torch.ones_like(mean)], [mean], [var]
    for past in pasts:
        moved = past.mean_at_0 + (past.dmean * weight).sum(1)
        linear = past.var_at_0 + (past.dvar * weight).sum(1)
        counts.append(past.counts)
        means.append(moved)
        variances.append((linear - (moved - past.mean).square()).clamp_min(0))
    shares = torch.stack(counts)
    shares = shares / shares.sum(0)
    each = torch.stack(means)
    center = (shares * each).sum(0)
    spread = torch.stack(variances) + (each - center).square()
    return center, (shares * spread).sum(0)


def weight_of(x: Tensor) -> tuple[list[Tensor], int]:
    """The parameters that make the weight of the convolution before.

    Returns:
        The parameters, none if they are not found; and the groups of a
        transposed convolution, 0 for others.
    """
    node = None if compat.is_compiling() else x.grad_fn
    while node is not None and node.name() in PASSED:
        node = node.next_functions[0][0]
    if node is None or not node.name().startswith('ConvolutionBackward'):
        return [], 0
    groups = compat.transposed_groups(node)
    found: list[Tensor] = []
    seen, stack = set(), [node.next_functions[1][0]]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [before for before, _ in node.next_functions]
        if hasattr(node, 'variable'):
            found.append(node.variable)
    fit = all(_filters(v, groups).shape[0] == x.shape[1] for v in found)
    return (found if fit else []), groups


def rows(weights: Sequence[Tensor], groups: int) -> Tensor:
    """Weights, or their gradients, as one row per output channel."""
    filters = [_filters(v.detach(), groups) for v in weights]
    return torch.cat([v.reshape(len(v), -1) for v in filters], 1)


def _filters(weight: Tensor, groups: int) -> Tensor:
    return swap_channels(weight, groups) if groups else weight


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _report_no_weight(kind: str) -> bool:
    return report_once(
        f'{kind} found no convolution with a trained weight right before it, '
        'and normalizes each batch by its own statistics, as BN: without '
        'gradients, in torch.compile, after a reentrant activation checkpoint '
        '(with_cp=True of a backbone; checkpoint(use_reentrant=False) is '
        'none), after another layer or a frozen one'
    )
