"""Batch Group Normalization."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..functional import largest_group_count
from ._batch import BatchStatistics


@MODELS.register_module()
class BatchGroupNorm(BatchStatistics):
    """Normalize by statistics of a group of channels over the batch.

    Formula, over all images and all channels of a group:
        output = (input - mean) / sqrt(var + eps) * weight + bias

    As many groups as channels are BN; one group is LN over the batch. The
    fewer groups, the more values in each: the paper takes fewer for smaller
    batches.

    Convention: the authors published no code. The paper merges channels,
        height and width before it cuts groups, so that a group may end
        within a map, and running values would depend on the size of the
        image. Here groups are whole channels. Running values are those of
        ``nn.BatchNorm2d``: unbiased variance.
    State: affine per channel; ``running_mean``, ``running_var``, one entry
        per group.

    Args:
        num_features: channels of the input.
        eps: constant added to the variance.
        momentum: share of the newest batch in the running values.
        affine: whether scale and shift are learned.
        num_groups: number of groups. None: 32, or the largest smaller
            number that divides ``num_features`` and leaves two channels.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has an illegal value, ``num_groups`` does not
            divide ``num_features``, or training sees one value per group.

    Source: arXiv 2012.02782.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        num_groups: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        if num_groups is None:
            num_groups = largest_group_count(num_features, 32)
        elif num_groups not in range(1, num_features + 1) or (
            num_features % num_groups
        ):
            raise ValueError(
                f'num_groups={num_groups} must divide the {num_features} '
                'channels of BatchGroupNorm: other groups end within a map, '
                'and their running values depend on the size of the image '
                '(norm_cfg=dict(num_groups=...))'
            )
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            unknown,
            device,
            dtype,
            num_rows=num_groups,
        )
        # That of nn.GroupNorm, too, which is otherwise not used here.
        self.num_groups = num_groups

    def rows(self, x: Tensor) -> Tensor:
        """View as (N, num_groups, values)."""
        return x.reshape(x.shape[0], self.num_groups, -1)

    def normalize(self, x: Tensor) -> Tensor:
        """BN of the groups, affine of the channels."""
        y = self.batch_norm(self.rows(x), None, None)
        return self.scaled(y.reshape(x.shape))

    def folded(self) -> tuple[Tensor, Tensor, nn.Module]:
        """Scale and shift of the evaluation."""
        return self.fold(self.weight, self.bias)

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return f'{super().extra_repr()}, num_groups={self.num_groups}'
