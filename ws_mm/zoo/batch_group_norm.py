"""Batch Group Normalization."""

from typing import Any

from mmengine.registry import MODELS
from torch import Tensor

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

    Convention: the authors published no code. In the paper a group may end
        within a map, so that running values depend on the size of the image.
        Here groups are whole channels.
    State: as its base, but one entry of the statistics per group.

    Args: those of :class:`~ws_mm.zoo._batch.BatchStatistics`, and
        num_groups: number of groups, which divides ``num_features``. None:
            32, or the largest smaller one that leaves two channels.

    Source: arXiv 2012.02782.
    """

    def __init__(
        self,
        num_features: int,
        *args: Any,
        num_groups: int | None = None,
        **kwargs: Any,
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
        super().__init__(num_features, *args, **kwargs)
        self.register_statistics(num_groups, **self._made)
        # That of nn.GroupNorm, too, which is otherwise not used here.
        self.num_groups = num_groups

    def _groups(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.num_groups, -1)

    def normalize(self, x: Tensor) -> Tensor:
        """BN of the groups, affine of the channels."""
        y = self.batch_norm(self._groups(x), None, None)
        return self.scaled(y.reshape(x.shape))

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """Mean and unbiased variance of each group."""
        return super().batch_statistics(self._groups(input))
