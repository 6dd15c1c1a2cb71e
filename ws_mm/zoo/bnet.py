"""Batch Normalization with an enhanced linear transformation (BNET-k)."""

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ._batch import BatchStatistics


@MODELS.register_module()
class BNET(BatchStatistics):
    """BN with a depthwise convolution in the place of its affine.

    Formula, with a kernel of k x k per channel, zero padding:
        output = conv(BN(input), kernel) + bias

    Convention: the authors use it for the last norm of each bottleneck. Their
        convolution is a module of its own, with zeros at the start and the
        decay of a filter. Here the kernel belongs to the norm: what hosts
        and Weight Standardization do to convolutions does not reach it.
        ``weight`` is its middle, so that it starts as BN, takes over a BN,
        and starts with zeros under ``zero_init_residual``.
    State: as its base; ``around``, the other k k - 1 entries of each channel,
        row by row, zeros at the start. It is one row of all channels, so
        that hosts spare it from decay.

    Args: those of :class:`~ws_mm.zoo._batch.BatchStatistics`, and
        affine: whether the convolution is there.
        kernel_size: k, an odd number; 1 is ``nn.BatchNorm2d``, others take
            images (N, C, H, W) alone.

    Source: arXiv 2011.14150; yuhuixu1993/BNET.
    """

    around: nn.Parameter

    def __init__(
        self, *args: Any, kernel_size: int = 3, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        is_odd = isinstance(kernel_size, int) and kernel_size % 2 == 1
        if not is_odd or kernel_size < 1:
            raise ValueError(
                f'kernel_size={kernel_size!r} must be an odd number of at '
                'least 1 (norm_cfg=dict(kernel_size=...))'
            )
        self.kernel_size = kernel_size
        number = self.num_features * (kernel_size**2 - 1)
        exists = self.affine and number > 0
        self.add_parameter('around', 0.0, number, exists=exists)

    def kernel(self) -> Tensor:
        """The kernel, in the layout of ``nn.Conv2d``."""
        before, after = self.around.view(self.num_features, 2, -1).unbind(1)
        rows = torch.cat([before, self.weight[:, None], after], 1)
        return rows.view(-1, 1, self.kernel_size, self.kernel_size)

    def normalize(self, x: Tensor) -> Tensor:
        """BN, then the convolution."""
        if self.around is None:
            return self.batch_norm(x, self.weight, self.bias)
        if x.dim() != 4:
            raise ValueError(
                f'BNET with kernel_size={self.kernel_size} takes images '
                f'(N, C, H, W), got {tuple(x.shape)}. Use '
                'norm_cfg=dict(kernel_size=1)'
            )
        return F.conv2d(
            self.batch_norm(x, None, None),
            self.kernel().to(x.dtype),
            self.bias.to(x.dtype),
            padding=self.kernel_size // 2,
            groups=self.num_features,
        )

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor, nn.Module]:
        """BN for the convolution before; what is left is the kernel's."""
        if self.around is None:
            return self.folded_with(self.weight, self.bias)
        scale, shift, _ = self.folded_with(None, None)
        channels, size = self.num_features, self.kernel_size
        geometry = dict(padding=size // 2, groups=channels)
        left = nn.utils.skip_init(
            nn.Conv2d, channels, channels, size, **geometry
        )
        left.weight = nn.Parameter(self.kernel())
        left.bias = nn.Parameter(self.bias.clone())
        return scale, shift, left.train(self.training)
