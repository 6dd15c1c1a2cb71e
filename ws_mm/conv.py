"""Convolutions with standardized weights (https://arxiv.org/abs/1903.10520).

Each class is its ``torch.nn`` namesake with one change: the weight that
reaches the convolution is :func:`~ws_mm.functional.standardize_weight` of
the parameter. Bias, parameter names and state dict are those of torch.
Use it where a normalization follows, and nowhere else: the scale of the
output is fixed, so logits, box regression and RPN predictions need plain
convolutions.
"""

import inspect
import logging
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from .arguments import check_eps, refuse_unknown
from .checkpoint import STANDARDIZED
from .functional import (
    check_eps_mode,
    check_fan_in,
    check_not_symbolic,
    standardize_weight,
)


class _WeightStandardized(nn.modules.conv._ConvNd):
    """What the three classes share; each also names its torch base."""

    _version = STANDARDIZED
    _loading = False

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        eps_mode: str = 'outside',
        **kwargs: Any,
    ) -> None:
        kind = type(self).__name__
        legal = {*inspect.signature(super().__init__).parameters}
        unknown = {key: kwargs[key] for key in kwargs if key not in legal}
        legal |= {'eps', 'eps_mode'}
        refuse_unknown(kind, 'conv_cfg', unknown, legal)
        check_eps(eps, 'conv_cfg')
        check_eps_mode(eps_mode)
        try:
            super().__init__(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise (TypeError if isinstance(error, TypeError) else ValueError)(
                f"conv_cfg=dict(type='ws_mm.{kind}') cannot be built: "
                f'{str(error).splitlines()[0]}'
            ) from error
        if self.out_channels < 1:
            raise ValueError(
                f'out_channels={self.out_channels} must be at least 1 '
                f"(conv_cfg=dict(type='ws_mm.{kind}'))"
            )
        check_fan_in(self.weight.shape[1:].numel())
        self.eps = eps
        self.eps_mode = eps_mode

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input`` with the standardized weight."""
        check_not_symbolic(input, type(self).__name__)
        weight = standardize_weight(
            self.weight,
            self.eps,
            self.eps_mode,
            _dtype_of_convolutions(self.weight),
        )
        return super()._conv_forward(input, weight, self.bias)

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        # Standardizing would erase any scale that the caller folded in.
        raise RuntimeError(
            f'{type(self).__name__} was handed a weight to convolve with, as '
            'efficient_conv_bn_eval does: the result would be wrong. Remove '
            'efficient_conv_bn_eval from the config, or bake the model '
            '(ws_mm.bake, tools/bake.py)'
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            name in ('weight', 'bias')
            and isinstance(value, nn.Parameter)
            and not self._loading
        ):
            parameters = self.__dict__.get('_parameters', {})
            before = parameters.get(name)
            if before is None:
                fused = name in parameters
            else:
                fused = name == 'weight' and _is_scaled(before, value)
            if fused:
                what, then = 'its weight, scaled,', ''
                if name == 'bias':
                    what = 'a new bias'
                    then = '. If its filters were scaled in place, reload them'
                raise RuntimeError(
                    f'{type(self).__name__} was given {what} by attribute, '
                    'as fuse_conv_bn does: standardizing undoes the scale '
                    'and the result would be wrong. Bake the model first '
                    f'(ws_mm.bake, tools/bake.py), then fuse that{then}'
                )
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
    ) -> None:
        version = local_metadata.get('version') or 1
        if f'{prefix}weight' in state_dict and version < STANDARDIZED:
            _report_unknown_filters(prefix[:-1], args[-1])
        # load_state_dict(assign=True) may assign any values.
        self._loading = True
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, *args
            )
        finally:
            del self._loading

    def extra_repr(self) -> str:
        return (
            f'{super().extra_repr()}, eps={self.eps}, '
            f'eps_mode={self.eps_mode!r}'
        )


@torch.no_grad()
def _is_scaled(before: Tensor, after: Tensor) -> bool:
    """Whether each filter is a multiple of what it was, some neither 0 nor 1.

    A filter scaled by 0 is 0 standardized, too; by 1 it is the same one.
    """
    if (
        before.shape != after.shape
        or before.device != after.device
        or before.is_meta
        or not all(type(p) is nn.Parameter for p in (before, after))
    ):
        return False
    rounding = 4 * max(torch.finfo(p.dtype).eps for p in (before, after))
    old, new = (p.flatten(1).double() for p in (before, after))
    norm = old.square().sum(1, keepdim=True).clamp_min(1e-300)
    factor = (new * old).sum(1, keepdim=True) / norm
    size = new.abs().amax(1, keepdim=True)
    multiple = (new - factor * old).abs() <= rounding * size
    same = (factor - 1).abs() <= rounding
    return bool(multiple.all() and not (same | (factor == 0)).all())


def _dtype_of_convolutions(weight: Tensor) -> torch.dtype:
    """The one that autocast would cast this weight to in a convolution.

    Standardizing writes it then, and no cast passes over the filters again.
    """
    device = weight.device.type
    if (
        weight.dtype == torch.float64  # autocast leaves those alone
        or not hasattr(torch, 'get_autocast_dtype')  # torch < 2.4
        or not torch.is_autocast_enabled(device)
    ):
        return weight.dtype
    return torch.get_autocast_dtype(device)


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
        TypeError: an argument is unknown or of the wrong type.
        ValueError: filters of one entry (1x1 depthwise, or 1x1 on a single
            input channel), or an unknown ``eps_mode``.
    """


@MODELS.register_module()
class WSConv3d(_WeightStandardized, nn.Conv3d):
    """3D convolution with a standardized weight; see :class:`WSConv2d`."""


_reported: list[list[str]] = []


def _report_unknown_filters(name: str, errors: list[str]) -> None:
    """Warn once per checkpoint; each load has its own list of errors."""
    if _reported and _reported[0] is errors:
        return
    _reported[:] = [errors]
    print_log(
        f'{name or "this convolution"}: the checkpoint does not say that its '
        'filters were trained standardized, as those of ws_mm do. A plain BN '
        'or GN network computes something else under WS, and its names and '
        'shapes cannot show it. Right are BN+WS, GN+WS and BCN+WS networks, '
        'such as open-mmlab://jhu/resnet50_gn_ws; of a plain ResNet, a start '
        'for training is made by: python tools/convert_checkpoint.py OLD NEW '
        '--approximate',
        logger='current',
        level=logging.WARNING,
    )
