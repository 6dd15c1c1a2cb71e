"""Cross-Iteration Batch Normalization (arXiv 2002.05712)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmengine.registry import MODELS
from torch import Tensor

from .. import compat
from ..arguments import check_count
from ..functional import swap_channels
from ..running_statistics import report_once, values_per_channel
from ._batch import BatchStatistics
from ._maps import joined_moments, moments_of_maps
from ._norm import per_channel

# What may lie between a convolution and its norm: casts, copies, hooks.
PASSED = ('ToCopyBackward0', 'CloneBackward0', 'BackwardHookFunctionBackward')


class Past(NamedTuple):
    """Statistics of a former iteration, for any weight w.

    mean(w) = mean_at_0 + dmean * w; mean is that of its own w.
    var(w) = max(var_at_0 + dvar * w - (mean(w) - mean)^2, 0)
    """

    mean: Tensor
    mean_at_0: Tensor
    var_at_0: Tensor
    dmean: Tensor
    dvar: Tensor


@MODELS.register_module()
class CrossIterationBN(BatchStatistics):
    """Batch norm by the statistics of the last iterations.

    Formula, with w the weight of the convolution before it, and a_s and b_s
    the mean and the mean square of the batch s iterations ago, s < window:
        a_s(w) = a_s + da_s/dw * (w - w_s)
        b_s(w) = max(b_s + db_s/dw * (w - w_s), a_s(w)^2)
        mean = mean over s of a_s(w)
        var = mean over s of b_s(w) - mean^2
        y = weight * (x - mean) / sqrt(var + eps) + bias
    Gradients pass through this iteration's a and b alone. w is constant.

    Convention: the paper's formula. The official code leaves out an s whose
        extrapolated b is below a^2, where the paper takes the maximum; it
        adds eps to the root, and its variance is unbiased in burn-in. Bias
        and earlier layers count as constant, as there. The autograd graph
        gives w, the parameter of a plain or standardized convolution.
        Only a cast may lie between the two layers.
    No weight: it is plain BN, after one warning, and the window begins anew:
        after another layer, a frozen convolution or one whose weight has a
        parameter without a row per output channel, in ``torch.compile`` and
        in reentrant checkpoints (``with_cp``). Without gradients it is plain
        BN, too, and the window stays.
    Iterations: each training forward is one, also under gradient
        accumulation. A head that pyramid levels share would mix their
        statistics: use GN there.
    State: as its base, and ``num_forwards``. The window, twice the size of w
        for each iteration, is not in the state dict: after loading one it
        fills again. Each training forward costs two more gradients of w.

    Args: those of :class:`~ws_mm.zoo._batch.BatchStatistics`, and
        window: number of iterations, this one included.
        burn_in: training forwards of plain batch norm at the start; the
            published COCO configs have those of 8 epochs.

    Source: arXiv 2002.05712; github.com/Howal/Cross-iterationBatchNorm.
    """

    num_forwards: Tensor

    def __init__(
        self, *args: Any, window: int = 4, burn_in: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_count('window', window, 1, 'norm_cfg')
        check_count('burn_in', burn_in, 0, 'norm_cfg')
        self.window, self.burn_in = window, burn_in
        self.count_forwards()

    def reset_parameters(self) -> None:
        """Also begin burn-in and window anew."""
        super().reset_parameters()
        # The first is that of the last forward, which may be recomputed.
        self._window: list[Past] = []
        self._is_plain = False
        # num_forwards: to read it from a device waits for the device.
        self._count: int | None = None

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize an input that has values."""
        if not self.training:
            return self.batch_norm(x, self.weight, self.bias)
        self.check_values(x)
        mean, var = self._over_iterations(x)
        scale = per_channel((var + self.eps).rsqrt(), x)
        return self.scaled_maps(x, per_channel(mean, x), scale)

    def _over_iterations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moves = self.begin_forward(x)
        mean, var = joined_moments(*moments_of_maps(x), 0)
        mean, var = mean.flatten(), var.flatten()
        leaves, groups = weight_of(x)
        weight = rows(leaves, groups).to(x.dtype) if leaves else mean
        if moves:
            count = values_per_channel(x)
            unbiased = var * (count / (count - 1))
            batch = dict(running_mean=mean, running_var=unbiased)
            self.move_statistics(batch, self.momentum)
            self._is_plain = not torch.is_grad_enabled()
            if self._is_plain:
                return mean, var
            if not leaves:
                _report_no_weight()
            elif not self._burns_in():
                # 1 would make gradients too small for float16.
                seed = torch.full_like(mean, count**0.5)
                past = [mean.detach()]
                slopes = []
                for v in (mean, var):
                    slope = torch.autograd.grad(v, leaves, seed, True)
                    slopes.append(rows(slope, groups) / count**0.5)
                    past.append(v.detach() - (slopes[-1] * weight).sum(1))
                self._window.insert(0, Past(*past, *slopes))
            like = _kind(weight)  # none is, without a weight
            self._window = [
                past
                for past in self._window[: self.window]
                if _kind(past.dmean) == like
            ]
        elif self._is_plain:  # so was the forward that is recomputed
            _report_no_weight()
            self._window = []
        return averaged(mean, var, self._window[1:], weight)

    def _burns_in(self) -> bool:
        """Count a forward; return whether it is one of the burn-in."""
        if self._count is None:
            self._count = int(self.num_forwards)
        self._count += 1
        self.num_forwards.add_(1)
        return self._count <= self.burn_in

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._window, self._count = [], None


def averaged(
    mean: Tensor, var: Tensor, pasts: list[Past], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance over this iteration and former ones.

    Channels in which a former one is not finite go without it.
    """
    if not pasts:
        return mean, var
    old, means, variances, dmeans, dvars = map(
        torch.stack, zip(*pasts, strict=True)
    )
    means = means + (dmeans * weight).sum(2)
    variances = variances + (dvars * weight).sum(2) - (means - old).square()
    used = (means + variances).isfinite()
    means = means.where(used, 0)
    variances = variances.where(used, 0).clamp_min(0)
    number = 1 + used.sum(0)
    center = (mean + means.sum(0)) / number
    spread = (variances + used * (means - center).square()).sum(0)
    return center, (var + (mean - center).square() + spread) / number


def weight_of(x: Tensor) -> tuple[list[Tensor], int]:
    """The parameters that make the weight of the convolution before, if any.

    And the groups of a transposed convolution, 0 for others.
    """
    node = None if compat.is_compiling() else x.grad_fn
    while node is not None and node.name() in PASSED:
        node = node.next_functions[0][0]
    if node is None or not node.name().startswith('ConvolutionBackward'):
        return [], 0
    groups = compat.transposed_groups(node)
    found, seen = [], set()
    stack = [node.next_functions[1][0]]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [before for before, _ in node.next_functions]
        if hasattr(node, 'variable'):
            found.append(node.variable)
    least = 2 if groups else 1  # dimensions of what has output channels
    fit = all(
        v.dim() >= least and len(_filters(v, groups)) == x.shape[1]
        for v in found
    )
    return (found if fit else []), groups


def rows(weights: Sequence[Tensor], groups: int) -> Tensor:
    """Weights, or their gradients, as one row per output channel."""
    filters = [_filters(v.detach(), groups) for v in weights]
    return torch.cat([v.reshape(len(v), -1) for v in filters], 1)


def _kind(v: Tensor) -> tuple[object, ...]:
    return v.shape, v.device, v.dtype


def _filters(weight: Tensor, groups: int) -> Tensor:
    return swap_channels(weight, groups) if groups else weight


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _report_no_weight() -> bool:
    return report_once(
        'CrossIterationBN found no trained weight of a convolution right '
        'before it, and is plain BN there: in torch.compile, in a reentrant '
        'activation checkpoint (with_cp=True), after another layer, a frozen '
        'convolution or one whose weight has a parameter without a row per '
        'output channel'
    )
