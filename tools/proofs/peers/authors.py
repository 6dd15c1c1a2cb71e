"""The authors' BCN, from its formula, with their names and nesting.

Source: ``BCNorm`` and ``EstBN``, README of the authors' BCN repository. Theirs
keeps the update rate in a buffer that starts at 0 and that nothing sets; here
it is an argument. The composed inner step and the batch norm that does the
outer one are theirs, too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EstBN(nn.Module):
    """Normalize by running estimates, in training too."""

    def __init__(self, num_features: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer('running_mean', torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Update the estimates, then use them."""
        if self.training:
            with torch.no_grad():
                flat = x.transpose(0, 1).reshape(x.shape[1], -1)
                mean = flat.mean(1)
                deviation = flat - self.running_mean.view(-1, 1)
                var = (deviation * deviation).mean(1)
                kept = self.running_mean.dtype
                self.running_mean.lerp_(mean.to(kept), self.rate)
                self.running_var.lerp_(var.to(kept), self.rate)
        y = x - self.running_mean.view(1, -1, 1, 1)
        y = y / torch.sqrt(self.running_var + 1e-5).view(1, -1, 1, 1)
        return self.weight.view(1, -1, 1, 1) * y + self.bias.view(1, -1, 1, 1)


class BCNorm(nn.Module):
    """EstBN or BatchNorm2d, then a channel norm with one affine per group."""

    _abbr_ = 'bn'

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        estimate: bool = True,
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.ones(1, num_groups, 1))
        self.bias = nn.Parameter(torch.zeros(1, num_groups, 1))
        if estimate:
            self.bn = EstBN(num_channels, rate)
        else:
            self.bn = nn.BatchNorm2d(num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by channel, then by group."""
        y = self.bn(x)
        y = y.reshape(1, x.size(0) * self.num_groups, -1)
        y = F.batch_norm(y, None, None, training=True, eps=self.eps)
        y = y.reshape(x.size(0), self.num_groups, -1)
        return (y * self.weight + self.bias).view(x.shape)
