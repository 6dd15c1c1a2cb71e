"""Iterative Normalization: groups of channels are whitened."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor

from ..arguments import check_count
from ..kernels.plain import at_least_float32
from ._columns import columns, exact_products, maps_of
from ._norm import RunningNorm


def unit_rows(rows: Tensor) -> Tensor:
    """Fill rows (C, width) with identity matrices, one below the other."""
    channel = torch.arange(rows.shape[0], device=rows.device)
    column = torch.arange(rows.shape[1], device=rows.device)
    return rows.copy_((channel % rows.shape[1])[:, None] == column)


@MODELS.register_module()
class IterNorm(RunningNorm):
    """Whiten groups of channels by Newton iterations.

    Formula, with a row of x for each channel of one group, a column for each
    of the m values, and the identity I:
        centered = x - mean(x)
        cov = centered centered^T / m, and s = cov + eps I
        p_0 = I, p_k = (3 p_{k-1} - p_{k-1}^3 s / tr(s)) / 2
        y = p_iterations centered / sqrt(tr(s))
        output = y * weight + bias
    Evaluation takes the running mean and cov.

    Convention: the authors' code averages the whitening matrix; here it is
        the covariance. It is linear in the values, so that weighted means
        over batches (``update_estimates``) have a meaning, and the authors
        report it to be more stable (arXiv 2003.12327). All groups but the
        last are equally wide: 80 channels are 40 and 40, in the authors' two
        versions 5 of 16, and 64 and 16.
    State: affine per channel; ``running_mean`` (C,), ``running_cov``
        (C, width of a group): covariances with the channels of the group.
    Few values: with fewer values than channels in a group, training differs
        from evaluation: of correlated normal values in 64 channels, 16 came
        out with a mean square of 0.21, 2048 with 0.47. Use a smaller
        ``channels_per_group`` there.
    From a batch norm: its variances, without correlations. Five iterations
        do not reach the inverse root of a wide group, so the function changes
        and such a layer should not stay frozen.
    Baked: it mixes channels, so ``bake`` does not fold it.

    Args: those of :class:`~ws_mm.zoo._norm.RunningNorm`, and
        channels_per_group: largest number of channels whitened together.
        iterations: Newton iterations; more whiten more, also what is noise
            in a small batch.

    Source: arXiv 1904.03441; github.com/huangleiBuaa/IterNorm-pytorch.
    """

    statistics: ClassVar = {'running_mean': 0.0, 'running_cov': unit_rows}
    running_mean: Tensor
    running_cov: Tensor
    estimating = False

    def __init__(
        self,
        *args: Any,
        channels_per_group: int = 64,
        iterations: int = 5,
        **kwargs: Any,
    ) -> None:
        check_count('channels_per_group', channels_per_group, 1, 'norm_cfg')
        check_count('iterations', iterations, 1, 'norm_cfg')
        super().__init__(*args, **kwargs)
        self.channels_per_group = channels_per_group
        self.iterations = iterations
        count = -(-self.num_features // channels_per_group)
        self.width = -(-self.num_features // count)
        self.register_statistics(
            self.num_features, **self._made, widths={'running_cov': self.width}
        )

    def normalize(self, x: Tensor) -> Tensor:
        """Whiten, by the batch in training."""
        moves = self.begin_forward(x)
        with exact_products(x):
            if self.training:
                self.check_values(x)
                mean, cov, centered = self._moments(x)
                if moves:
                    batch = dict(running_mean=mean, running_cov=cov)
                    self.move_statistics(batch, self.momentum)
            else:
                centered = columns(x) - self.running_mean.to(x.dtype)[:, None]
                cov = self.running_cov.to(x.dtype)
            y = self._whitening(cov) @ self._groups(centered)
        matrix = y.flatten(0, 1)[: self.num_features]
        return self.scaled(maps_of(matrix, x))

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """Mean, and biased covariance within the groups."""
        with exact_products(input):
            mean, cov, _ = self._moments(at_least_float32(input.detach()))
        return dict(running_mean=mean, running_cov=cov)

    def of_batch_norm(self, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        """Take channels that do not correlate."""
        rows = unit_rows(var.new_empty(self.running_cov.shape))
        return dict(running_mean=mean, running_cov=rows * var[:, None])

    def _groups(self, rows: Tensor) -> Tensor:
        """Rows of channels as (groups, width, *); zeros fill the last."""
        missing = -self.num_features % self.width
        padded = F.pad(rows, (0, 0, 0, missing)) if missing else rows
        return padded.view(-1, self.width, rows.shape[1])

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (C,), covariance (C, width), and centered values."""
        rows = columns(x)
        mean = rows.mean(1)
        centered = rows - mean[:, None]
        groups = self._groups(centered)
        cov = groups @ groups.transpose(1, 2) / rows.shape[1]
        return mean, cov.flatten(0, 1)[: self.num_features], centered

    def _whitening(self, cov: Tensor) -> Tensor:
        """The inverse square root, as far as the iterations get."""
        s = self._groups(cov + self.eps * unit_rows(torch.empty_like(cov)))
        trace = s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        s = s / trace
        p = torch.eye(self.width, dtype=s.dtype, device=s.device).expand_as(s)
        for _ in range(self.iterations):
            p = 1.5 * p - 0.5 * (p @ p @ p @ s)
        return p * trace.rsqrt()
