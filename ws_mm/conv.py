"""Convolutions with standardized weights (https://arxiv.org/abs/1903.10520).

Each class is its ``torch.nn`` namesake with one change: the weight that
reaches the convolution is :func:`~ws_mm.functional.standardize_weight` of
the parameter. Bias, parameter names and state dict are those of torch.
Use it where a normalization follows, and nowhere else: the scale of the
output is fixed, so logits, box regression and RPN predictions need plain
convolutions.
"""

from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from .functional import check_eps_mode, check_fan_in, standardize_weight


class _WeightStandardized(nn.modules.conv._ConvNd):
    """What the three classes share; each also names its torch base."""

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        eps_mode: str = 'outside',
        **kwargs: Any,
    ) -> None:
        check_eps_mode(eps_mode)
        super().__init__(*args, **kwargs)
        check_fan_in(self.weight.shape[1:].numel())
        self.eps = eps
        self.eps_mode = eps_mode

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        if weight is not self.weight:
            # Standardizing erases any scale that the caller folded in.
            raise RuntimeError(
                f'{type(self).__name__} was handed a weight that is not its '
                'own, as efficient_conv_bn_eval does: the result would be '
                'wrong. Remove efficient_conv_bn_eval from the config'
            )
        weight = standardize_weight(weight, self.eps, self.eps_mode)
        return super()._conv_forward(input, weight, bias)

    def extra_repr(self) -> str:
        return (
            f'{super().extra_repr()}, eps={self.eps}, '
            f'eps_mode={self.eps_mode!r}'
        )


@MODELS.register_module()
class WSConv1d(_WeightStandardized, nn.Conv1d):
    """1D convolution with a standardized weight; see :class:`WSConv2d`."""


@MODELS.register_module()
class WSConv2d(_WeightStandardized, nn.Conv2d):
    """2D convolution with a standardized weight.

    Formula:
        output = conv2d(input, standardize_weight(weight)) + bias

    Convention: unbiased variance, eps added to the standard deviation, as
        mmcv's ``ConvWS`` and the published GN+WS checkpoints have it.
    State: as ``nn.Conv2d``. Standardized anew in every forward, in training
        and in eval: nothing is cached.

    Args:
        *args: those of ``nn.Conv2d``, in its order.
        eps: see :func:`~ws_mm.functional.standardize_weight`.
        eps_mode: 'outside' the root, or 'inside' as the authors' BCN
            ImageNet checkpoints were trained.
        **kwargs: those of ``nn.Conv2d``, ``padding_mode``, ``device`` and
            ``dtype`` included.

    Raises:
        ValueError: filters of one entry (1x1 depthwise, or 1x1 on a single
            input channel), or an unknown ``eps_mode``.
    """


@MODELS.register_module()
class WSConv3d(_WeightStandardized, nn.Conv3d):
    """3D convolution with a standardized weight; see :class:`WSConv2d`."""
