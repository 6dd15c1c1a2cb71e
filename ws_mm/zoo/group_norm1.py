"""Group Normalization of one group (arXiv 1803.08494)."""

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor

from ..functional import check_group_size
from ._norm import Norm


@MODELS.register_module()
class GroupNorm1(Norm):
    """Group Normalization of one group: all channels of one image.

    Formula, with mean and biased variance of all values of one image:
        output = weight * (x - mean) / sqrt(var + eps) + bias

    Convention: computes ``nn.GroupNorm(1, num_features)`` and has its state
        dict, as timm's ``GroupNorm1``. A config needs no number of groups.
    State: ``weight`` and ``bias``, one entry per channel.

    Source: the layer of PoolFormer (arXiv 2111.11418), timm's ``norm.py``.
    """

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize each image."""
        check_group_size(x, 1, 'GroupNorm1')
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if weight is not None and bias is not None:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.group_norm(x, 1, weight, bias, self.eps)
