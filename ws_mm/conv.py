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
import math
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from .arguments import check_choice, check_eps, reject_unknown
from .checkpoint import CENTERED, STANDARDIZED
from .compat import autocast_dtype
from .functional import (
    EPS_MODES,
    check_fan_in,
    standardize_weight,
    swap_channels,
)
from .symbolic import recorded

TORCH = nn.Conv2d.__module__


class _WeightStandardized(nn.modules.conv._ConvNd):
    """Base of all classes; each also names its torch base."""

    _version = STANDARDIZED
    _unknown_filters = (
        'the checkpoint does not say that its filters were trained '
        'standardized, as those of ws_mm do. A plain BN or GN network '
        'computes something else under WS, and its names and shapes cannot '
        'show it. BN+WS, GN+WS and BCN+WS networks are right, such as '
        'open-mmlab://jhu/resnet50_gn_ws. To start from a plain ResNet, run: '
        'python tools/model_converters/convert_checkpoint.py OLD NEW '
        '--approximate'
    )
    _loading = False
    # Whether plain filters that are loaded compute here what they did.
    keeps_plain = False
    # torch's skip_init looks for a device among the arguments.
    __signature__: inspect.Signature | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Join the signatures of the torch base and of this class."""
        super().__init_subclass__(**kwargs)
        own = inspect.signature(cls.__init__).parameters
        if all(p.kind is not p.VAR_POSITIONAL for p in own.values()):
            cls.__signature__ = None  # its own, not that of its base
            return
        torch_base = next(b for b in cls.__mro__ if b.__module__ == TORCH)
        cls.__signature__ = inspect.Signature(
            [
                *inspect.signature(torch_base).parameters.values(),
                *(p for p in own.values() if p.kind is p.KEYWORD_ONLY),
            ]
        )

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
        legal = {*inspect.signature(type(self)).parameters}
        reject_unknown(kind, 'conv_cfg', unknown, legal)
        check_eps(eps, 'conv_cfg')
        check_choice('eps_mode', eps_mode, EPS_MODES, 'conv_cfg')
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
        check_fan_in(math.prod(self._filters(self.weight).shape[1:]))
        self.eps = eps
        self.eps_mode = eps_mode

    @recorded
    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input`` with the standardized weight."""
        weight = self.standardized_weight(_dtype_of_convolutions(self.weight))
        return super()._conv_forward(input, weight, self.bias)

    def standardized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that reaches the convolution, in the layout of weight.

        Args:
            dtype: output dtype; defaults to weight.dtype.
        """
        filters = standardize_weight(
            self._filters(self.weight), self.eps, self.eps_mode, dtype
        )
        return self._filters(filters)

    def _filters(self, weight: Tensor) -> Tensor:
        """To one row per output channel, and back."""
        return weight

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        # Standardizing would erase any scale that the caller folded in.
        raise RuntimeError(
            f'{type(self).__name__} was handed a weight to convolve with, as '
            'efficient_conv_bn_eval does: the result would be wrong. Remove '
            'efficient_conv_bn_eval from the config, or bake the model '
            '(ws_mm.bake, tools/deployment/bake.py)'
        )

    def __setattr__(self, name: str, value: Any) -> None:
        parameters = self.__dict__.get('_parameters', {})
        what, before = '', parameters.get(name)
        if isinstance(value, nn.Parameter) and not self._loading:
            if name == 'bias' and name in parameters and before is None:
                what = 'a new bias'
            elif name == 'weight' and self._is_scaled(before, value):
                what = 'its weight, scaled,'
        if what:
            raise RuntimeError(
                f'{type(self).__name__} was given {what} by attribute, as '
                'fuse_conv_bn does: standardizing undoes the scale and the '
                'result would be wrong. Bake the model first (ws_mm.bake, '
                'tools/deployment/bake.py), then fuse that; reload filters '
                'that were scaled in place'
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, *args: Any
    ) -> None:
        # What no plain convolution has: these filters are of such a layer.
        own = {*self._parameters, *self._buffers} - {'weight', 'bias'}
        if (
            f'{prefix}weight' in state_dict
            and not self._fits(metadata.get('version') or 1)
            and not any(f'{prefix}{name}' in state_dict for name in own)
        ):
            report_filters(self._unknown_filters, prefix[:-1], args[-1])
        # load_state_dict(assign=True) may assign any values.
        self._loading = True
        try:
            super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        finally:
            del self._loading

    def _fits(self, version: int) -> bool:
        """Return whether filters of this version mean the same here."""
        return STANDARDIZED <= version < CENTERED

    @torch.no_grad()
    def _is_scaled(self, before: Tensor | None, after: Tensor) -> bool:
        """Return whether filters are the old ones times a scale.

        Scales of 0 and 1 alone do not count: they change no output.
        """
        if (
            type(before) is not nn.Parameter
            or type(after) is not nn.Parameter
            or before.shape != after.shape
            or before.device != after.device
            or before.is_meta
        ):
            return False
        rounding = 4 * max(torch.finfo(p.dtype).eps for p in (before, after))
        old, new = (
            self._filters(p).flatten(1).double() for p in (before, after)
        )
        norm = old.square().sum(1, keepdim=True).clamp_min(1e-300)
        factor = (new * old).sum(1, keepdim=True) / norm
        size = new.abs().amax(1, keepdim=True)
        multiple = (new - factor * old).abs() <= rounding * size
        kept = ((factor - 1).abs() <= rounding) | (factor == 0)
        return bool(multiple.all() and not kept.all())

    def extra_repr(self) -> str:
        return (
            f'{super().extra_repr()}, eps={self.eps}, '
            f'eps_mode={self.eps_mode!r}'
        )


def _dtype_of_convolutions(weight: Tensor) -> torch.dtype:
    """The dtype to which autocast casts this weight in a convolution.

    Standardizing to it saves a second pass over the filters.
    """
    if weight.dtype == torch.float64:  # autocast leaves those alone
        return weight.dtype
    return autocast_dtype(weight.device.type) or weight.dtype


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
    State: as ``nn.Conv2d``. Every forward standardizes again, in training
        and in eval: nothing is cached.

    Args:
        *args: arguments of ``nn.Conv2d``, in its order.
        eps: eps of :func:`~ws_mm.functional.standardize_weight`.
        eps_mode: 'outside' the root, or 'inside' as in the authors' BCN
            ImageNet checkpoints.
        **kwargs: arguments of ``nn.Conv2d``, ``padding_mode``, ``device``
            and ``dtype`` included.

    Raises:
        TypeError: an argument is unknown or of the wrong type.
        ValueError: filters of one entry (1x1 depthwise, or 1x1 on a single
            input channel), or an unknown ``eps_mode``.
    """


@MODELS.register_module()
class WSConv3d(_WeightStandardized, nn.Conv3d):
    """3D convolution with a standardized weight; see :class:`WSConv2d`."""


class _TransposedWeightStandardized(_WeightStandardized):
    """Base of the three transposed classes."""

    @recorded
    def forward(
        self, input: Tensor, output_size: list[int] | None = None
    ) -> Tensor:
        """Convolve ``input``, transposed, with the standardized weight."""
        weight = self.standardized_weight(_dtype_of_convolutions(self.weight))
        dims = weight.dim() - 2
        torch_base: Any = self
        output_padding = torch_base._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            dims,
            self.dilation,
        )
        convolve: Any = getattr(F, f'conv_transpose{dims}d')
        output: Tensor = convolve(
            input,
            weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )
        return output

    def _filters(self, weight: Tensor) -> Tensor:
        return swap_channels(weight, self.groups)


@MODELS.register_module()
class WSConvTranspose1d(_TransposedWeightStandardized, nn.ConvTranspose1d):
    """1D transposed convolution; see :class:`WSConvTranspose2d`."""


@MODELS.register_module()
class WSConvTranspose2d(_TransposedWeightStandardized, nn.ConvTranspose2d):
    """2D transposed convolution with a standardized weight, for U-Nets.

    Formula, for the in_channels / groups inputs i that output channel o has,
    with w[o] = weight[i, o] over all of them and kernel_size:
        w[o] = (w[o] - mean(w[o])) / (std(w[o]) + eps)
        output = conv_transpose2d(input, w) + bias

    Convention: that of :class:`WSConv2d`: one filter makes one output
        channel. The first axis of ``weight`` is that of the inputs, so mean
        and std go over axes 0, 2 and 3, group by group.
    State: as ``nn.ConvTranspose2d``.

    Args:
        *args: arguments of ``nn.ConvTranspose2d``, in its order.
        eps: eps of :func:`~ws_mm.functional.standardize_weight`.
        eps_mode: 'outside' the root, or 'inside'.
        **kwargs: arguments of ``nn.ConvTranspose2d``.

    Raises:
        TypeError: an argument is unknown or of the wrong type.
        ValueError: filters of one entry, or an unknown ``eps_mode``.
    """


@MODELS.register_module()
class WSConvTranspose3d(_TransposedWeightStandardized, nn.ConvTranspose3d):
    """3D transposed convolution; see :class:`WSConvTranspose2d`."""


_reported: list[list[str]] = []


def report_filters(
    text: str, name: str, errors: list[str], level: int = logging.WARNING
) -> None:
    """Say it once per checkpoint; each load has its own list of errors.

    Args:
        text: what the filters are.
        name: name of the first such layer.
        errors: the list of this load.
        level: level of the message.
    """
    if _reported and _reported[0] is errors:
        return
    _reported[:] = [errors]
    name = name or 'this convolution'
    print_log(f'{name}: {text}', logger='current', level=level)
