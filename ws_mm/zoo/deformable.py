"""Modulated deformable convolution (DCNv2) with standardized filters."""

import importlib
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..arguments import check_count, reject_unknown
from ..conv import WSConv2d
from ..running_statistics import legal_arguments
from ..symbolic import recorded


@MODELS.register_module()
class WSModulatedDeformConv2d(WSConv2d, nn.Conv2d):
    """Modulated deformable convolution with a standardized weight.

    Formula: that of ``mmcv.ops.ModulatedDeformConv2d``, of
        :func:`~ws_mm.functional.standardize_weight` of the weight.

    Convention: mmcv's operator computes, in the dtype of ``offset`` as mmcv
        does, and bfloat16, which it lacks, in float32. It computes wrong
        values from ``channels_last``, of which this layer makes copies, and
        mmcv's layers, baked ones included, do not. It takes part in no
        ``torch.compile`` graph. The layer is no subclass of mmcv's: the
        host's ``dcn_offset_lr_mult`` does not reach ``conv_offset``, but
        ``paramwise_cfg=dict(custom_keys={'conv_offset': dict(lr_mult=...)})``
        does.
    State: that of mmcv's; loading its plain filters warns.

    Args: those of :class:`~ws_mm.conv.WSConv2d`, and
        deform_groups: groups of input channels with offsets of their own.
        padding: in pixels.

    Raises:
        ImportError: mmcv, or its compiled operators, are missing.

    Source: arXiv 1811.11168 and 1903.10520; ``mmcv.ops``.
    """

    # mmcv's plain layers have version 2, which is STANDARDIZED.
    _version = 3
    plain_name = 'ModulatedDeformConv2d'

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        eps_mode: str = 'outside',
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        kind = type(self)
        reject_unknown(kind.__name__, 'dcn', unknown, legal_arguments(kind))
        operators(kind.__name__)
        if isinstance(padding, str):
            raise ValueError(
                f'padding={padding!r} must be a number of pixels, or two '
                f'({kind.__name__})'
            )
        check_count('deform_groups', deform_groups, 1, 'dcn')
        if in_channels % deform_groups:
            raise ValueError(
                f'deform_groups={deform_groups!r} must divide '
                f'in_channels={in_channels} (dcn=dict(deform_groups=...))'
            )
        shape = in_channels, out_channels, kernel_size
        geometry = stride, padding, dilation, groups
        made = dict(device=device, dtype=dtype)
        super().__init__(
            *shape, *geometry, bias, eps=eps, eps_mode=eps_mode, **made
        )
        self.deform_groups = deform_groups
        self._add_offsets()

    def _add_offsets(self) -> None:
        """The pack makes its own; one constructor has all arguments."""

    @property
    def plain_type(self) -> type[nn.Module]:
        """Class of the baked layer."""
        mmcv = operators(type(self).__name__)
        kind: type[nn.Module] = getattr(mmcv, self.plain_name)
        return kind

    @recorded
    def forward(  # type: ignore[override]
        self, input: Tensor, offset: Tensor, mask: Tensor
    ) -> Tensor:
        """Convolve ``input`` where ``offset`` says, weighted by ``mask``.

        The offset is (N, 2 * deform_groups * entries of a kernel, H, W) of
        the output, vertical and horizontal by turns, in pixels; the mask has
        half as many channels.
        """
        dtype = offset.dtype
        if dtype == torch.bfloat16:
            dtype = torch.float32
        weight = self.standardized_weight(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        x = input.to(dtype)
        geometry: Any = self.stride, self.padding, self.dilation, self.groups
        if not input.numel():
            # The operator divides by the number of images.
            y = nn.functional.conv2d(x, weight, bias, *geometry)
            y = y + 0 * (offset.sum() + mask.sum())
        else:
            # The operator does not look at strides, such as those of
            # channels_last.
            values = (x, offset.to(dtype), mask.to(dtype), weight)
            convolve = operators('').modulated_deform_conv2d
            y = convolve(
                *(each.contiguous() for each in values),
                *(bias, *geometry, self.deform_groups),
            )
        return y.to(offset.dtype)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, *args: Any
    ) -> None:
        offsets = f'{prefix}conv_offset.weight'
        if metadata.get('version') == 2 and offsets in state_dict:
            metadata = {**metadata, 'version': 1}
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


@MODELS.register_module()
class WSModulatedDeformConv2dPack(WSModulatedDeformConv2d, nn.Conv2d):
    """The same with the convolution that finds offsets and mask.

    For ``dcn`` of the hosts' backbones. They refuse ``conv_cfg`` beside it;
    :func:`~ws_mm.converted.converted` standardizes the other convolutions.
    docs/zoo.md has such a config.

    State: that of mmcv's ``DCNv2``: ``weight``, ``bias`` and
        ``conv_offset``, which starts at 0: offsets 0, masks 1/2.
    """

    plain_name = 'ModulatedDeformConv2dPack'
    host_type = 'DCNv2'  # in a config that needs no ws_mm

    def _add_offsets(self) -> None:
        entries = self.kernel_size[0] * self.kernel_size[1]
        channels = 3 * self.deform_groups * entries
        made: Any = dict(device=self.weight.device, dtype=self.weight.dtype)
        size: Any = self.kernel_size
        geometry: Any = self.stride, self.padding, self.dilation
        self.conv_offset = nn.Conv2d(
            self.in_channels, channels, size, *geometry, **made
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Set offsets to 0; the host calls it after its initializers."""
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    @recorded
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Find offsets and mask, and convolve."""
        vertical, horizontal, mask = self.conv_offset(input).chunk(3, 1)
        # The operator pairs neighbouring channels, whoever made them.
        offset = torch.cat((vertical, horizontal), 1)
        return super().forward(input, offset, mask.sigmoid())


def operators(needed_by: str) -> Any:
    """The module mmcv.ops."""
    try:
        return importlib.import_module('mmcv.ops')
    except ImportError as error:
        raise ImportError(
            f'{needed_by} needs the compiled operators of mmcv, which '
            'mmcv-lite does not have. Install mmcv, or use '
            "conv_cfg=dict(type='ws_mm.WSConv2d') and dcn=None"
        ) from error
