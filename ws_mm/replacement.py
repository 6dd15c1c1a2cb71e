"""Replacement of one layer: which can be replaced, and by what.

Layers of timm, torchvision, mmcv or a user are judged by what they compute,
not by their names: a copy runs beside the torch layer that it has to equal.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .conv import (
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose1d,
    WSConvTranspose2d,
    WSConvTranspose3d,
)
from .functional import swap_channels
from .running_statistics import RunningStatistics, channels_of
from .symbolic import recorded

WS_TO_PLAIN: dict[type, type] = {
    WSConv1d: nn.Conv1d,
    WSConv2d: nn.Conv2d,
    WSConv3d: nn.Conv3d,
    WSConvTranspose1d: nn.ConvTranspose1d,
    WSConvTranspose2d: nn.ConvTranspose2d,
    WSConvTranspose3d: nn.ConvTranspose3d,
}
PLAIN_TO_WS = {plain: ws for ws, plain in WS_TO_PLAIN.items()}
# Known by name: ws_mm imports neither mmcv nor timm.
FOREIGN_WS = {'ConvWS2d', 'ConvAWS2d', 'StdConv2d', 'StdConv2dSame'}
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
INSTANCE_NORMS = nn.modules.instancenorm._InstanceNorm


class WSConv2dSame(WSConv2d):
    """A :class:`~ws_mm.conv.WSConv2d` with padding 'same'.

    Formula, for each of height and width:
        padding = max((ceil(size / stride) - 1) * stride
                      + dilation * (kernel_size - 1) + 1 - size, 0)
    zeros, of which the smaller half goes in front.

    Source: TensorFlow's ``'SAME'``; timm's ``Conv2dSame`` and mmcv's
        ``Conv2dAdaptivePadding`` compute it.
    """

    @recorded
    def forward(self, input: Tensor) -> Tensor:
        """Pad ``input``, then convolve it with the standardized weight."""
        return super().forward(_pad_same(input, self))


def _pad_same(input: Tensor, conv: Any) -> Tensor:
    padding: list[int] = []
    # From the last dimension to the first, as F.pad wants them.
    for i in (-1, -2):
        size, stride = input.shape[i], conv.stride[i]
        reach = conv.dilation[i] * (conv.kernel_size[i] - 1) + 1
        missing = max((-(-size // stride) - 1) * stride + reach - size, 0)
        padding += missing // 2, missing - missing // 2
    return nn.functional.pad(input, padding)


class WSConv2dNormAct(WSConv2d):
    """A :class:`~ws_mm.conv.WSConv2d` that holds a norm and an activation.

    Formula:
        output = activation(norm(conv(input)))
    where each may be None.

    Source: the attributes of detectron2's ``Conv2d``.
    """

    norm: nn.Module | None
    activation: Callable[[Tensor], Tensor] | None

    @recorded
    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input`` with the standardized weight, then the rest."""
        return _norm_act(super().forward(input), self)


def _norm_act(output: Tensor, conv: Any) -> Tensor:
    for function in (conv.norm, conv.activation):
        output = output if function is None else function(output)
    return output


class Mixin(nn.Module):
    """Base of what :func:`mixed` gives to a class."""

    suffix = ''

    def __reduce__(self) -> tuple[Any, ...]:
        # Its class is no name of a module, by which pickle could find it.
        return _unpickled, type(self).__bases__, vars(self)


_mixed: dict[tuple[type, type], Any] = {}


def mixed(mixin: type[Mixin], cls: type[nn.Module]) -> Any:
    """The class of a :class:`Mixin` and of another class."""
    both = mixin, cls
    if both not in _mixed:
        _mixed[both] = type(f'{cls.__name__}{mixin.suffix}', both, {})
    return _mixed[both]


def _unpickled(mixin: Any, cls: Any) -> Any:
    kind = mixed(mixin, cls)
    return kind.__new__(kind)


class WithAct(Mixin):
    """Base of norms that also have the drop and act of the norm before.

    Formula:
        output = act(drop(norm(input)))

    Source: the attributes of timm's ``BatchNormAct2d``.
    """

    suffix = 'Act'  # as timm's names end

    drop: nn.Module
    act: nn.Module

    @recorded
    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, then drop and activate."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


def standardizes(conv: nn.Module) -> bool:
    """Return whether a convolution standardizes, by any formula."""
    return any(
        base in WS_TO_PLAIN or base.__name__ in FOREIGN_WS
        for base in type(conv).__mro__
    )


def fan_in(conv: Any) -> int:
    """Entries of one filter."""
    return int(conv.in_channels // conv.groups * math.prod(conv.kernel_size))


def ws_type(conv: Any) -> type | None:
    """The WS class for a convolution, or None.

    None if it computes more than its torch namesake, if another module
    computes its weight, or if its forward was replaced.
    """
    if is_ours(conv):
        return type(conv)
    if 'weight' not in conv._parameters or 'forward' in vars(conv):
        return None
    if type(conv) in PLAIN_TO_WS:
        return PLAIN_TO_WS[type(conv)]
    base: Any = next((b for b in type(conv).__mro__ if b in PLAIN_TO_WS), None)
    if base is None or conv.transposed:
        return None
    probe, random = _probe(conv)
    # As many sizes as strides tell apart, and at least both parities.
    inputs = [
        torch.randn(
            1,
            conv.in_channels,
            *(
                dilation * (kernel - 1) + 2 * stride + more
                for dilation, kernel, stride in zip(
                    conv.dilation, conv.kernel_size, conv.stride, strict=True
                )
            ),
            **random,
        )
        for more in range(1, 1 + max(2, *conv.stride))
    ]

    def plain(x: Tensor) -> Any:
        return base._conv_forward(probe, x, probe.weight, probe.bias)

    if all(_equal(probe, x, plain(x)) for x in inputs):
        return PLAIN_TO_WS[base]
    if base is not nn.Conv2d:
        return None
    if all(_equal(probe, x, plain(_pad_same(x, conv))) for x in inputs):
        return WSConv2dSame
    holds_both = hasattr(conv, 'norm') and hasattr(conv, 'activation')
    if holds_both and all(
        _equal(probe, x, _norm_act(plain(x), probe)) for x in inputs
    ):
        return WSConv2dNormAct
    return None


def standardize(
    conv: Any, eps: float = 1e-5, eps_mode: str = 'outside'
) -> None:
    """Make a convolution standardize its filters, in place.

    Args:
        conv: convolution for which :func:`ws_type` returns a class.
        eps: eps of :func:`~ws_mm.functional.standardize_weight`.
        eps_mode: eps_mode of the same function.
    """
    ws = ws_type(conv)
    assert ws is not None
    if type(conv) not in (ws, WS_TO_PLAIN.get(ws)):
        conv.plain_type = type(conv)
    conv.__class__ = ws
    conv.eps, conv.eps_mode = eps, eps_mode


def plain_type(conv: Any) -> type:
    """The class that a WS convolution had, or is the namesake of."""
    declared = getattr(conv, 'plain_type', None)
    return declared or WS_TO_PLAIN[_own_base(conv)]  # type: ignore[index]


def rows_of(conv: Any, weight: Tensor) -> Tensor:
    """A weight with one row per output channel; its own inverse."""
    return swap_channels(weight, conv.groups) if conv.transposed else weight


def is_ours(conv: nn.Module) -> bool:
    """Return whether a convolution is one of ws_mm.

    Subclasses are, if ``standardized_weight`` of the parameter ``weight`` is
    all that they change, or if they declare the ``plain_type`` that computes
    the rest. Those whose weight a hook computes, as of pruning, are not.
    """
    base: Any = _own_base(conv)
    return (
        base is not None
        and (
            type(conv).forward is base.forward
            or hasattr(type(conv), 'plain_type')
        )
        and 'weight' in conv._parameters
    )


def _own_base(conv: Any) -> type | None:
    own = {*WS_TO_PLAIN, WSConv2dSame, WSConv2dNormAct}
    return next((base for base in type(conv).__mro__ if base in own), None)


def is_batch_norm(module: nn.Module) -> bool:
    """Recognize a norm with running statistics that is not of ws_mm.

    True for torchvision's ``FrozenBatchNorm2d`` and mmcv's own
    ``SyncBatchNorm``, too, which are no subclasses of torch's.
    """
    if isinstance(module, (RunningStatistics, INSTANCE_NORMS)):
        return False
    names = {'running_mean', 'running_var'}
    return isinstance(module, BATCH_NORMS) or names <= module._buffers.keys()


def why_kept(norm: Any) -> str:
    """Why no norm can take the place of this one; '' where one can."""
    if not (is_batch_norm(norm) or isinstance(norm, nn.GroupNorm)):
        return 'is no BatchNorm or GroupNorm'
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        return 'has not run yet, so that its channels are not known'
    if is_batch_norm(norm) and norm.running_mean is None:
        return 'keeps no statistics'
    own = {**norm._buffers, **norm._parameters}
    if not {'weight', 'bias'} <= own.keys():
        return 'has no weight and bias of its own'
    names = 'weight', 'bias', 'running_mean', 'running_var'
    values = [own[name] for name in names if own.get(name) is not None]
    if any(value.dim() != 1 for value in values):
        return 'keeps its values in another shape'
    if 'forward' in vars(norm):
        return 'has another forward than its class'
    children = dict(norm.named_children())
    more = [name for name in children if name not in ('drop', 'act')]
    if more:
        return f'has layers of its own ({", ".join(more)})'
    if type(norm).__module__.startswith('torch.nn.'):
        return ''
    probe, random = _probe(norm)
    dims = 2
    for base, number in ((nn.BatchNorm1d, 1), (nn.BatchNorm3d, 3)):
        dims = number if isinstance(norm, base) else dims
    x = torch.randn(2, channels_of(norm), *[3] * dims, **random)
    if is_batch_norm(norm):
        # F.batch_norm takes no eps of 0, which torchvision's detectors have.
        shape = 1, -1, *[1] * dims
        # Without one: the constant of DETR's FrozenBatchNorm2d, as torch's.
        var = probe.running_var.view(shape) + getattr(norm, 'eps', 1e-5)
        expected = (x - probe.running_mean.view(shape)) / var.sqrt()
        if probe.weight is not None:
            expected = expected * probe.weight.view(shape)
        if probe.bias is not None:
            expected = expected + probe.bias.view(shape)
    else:
        expected = nn.functional.group_norm(
            x, norm.num_groups, probe.weight, probe.bias, norm.eps
        )
    for name in ('drop', 'act'):
        expected = getattr(probe, name, nn.Identity())(expected)
    same = _equal(probe, x, expected)
    return '' if same else 'computes something else than a norm'


@torch.no_grad()
def replacement_of(
    norm: Any,
    kind: type[RunningStatistics],
    arguments: Mapping[str, Any],
    like: Tensor,
) -> RunningStatistics:
    """Make the layer that takes the place of a norm.

    Args:
        norm: one for which :func:`why_kept` has no reason.
        kind: class of the layer; see its ``from_norm``.
        arguments: constructor arguments, which win over those of norm.
        like: a tensor of the device and dtype for a norm without any tensor.

    Raises:
        ValueError: an argument does not fit the norm.
    """
    has_act = any(True for _ in norm.children())
    made: Any = mixed(WithAct, kind) if has_act else kind
    layer, sources = made.from_norm(norm, arguments)
    like = next(iter(norm.state_dict().values()), like)
    layer.to(dtype=like.dtype)
    learns = {
        name: values.requires_grad
        for name, values in norm.named_parameters(recurse=False)
    }
    for target, new in [*layer.named_parameters()]:
        values = sources.get(target, new).detach().clone()
        values = values.to(like.device, new.dtype)
        # Both affines of BCN as the one before; any other if that learns.
        own = target.removeprefix('bn_')
        learned = learns.get(own, not learns or any(learns.values()))
        setattr(layer, target, nn.Parameter(values, learned))
    for target, initial in [*layer.named_buffers()]:
        found = sources.get(target, initial)
        setattr(layer, target, found.clone().to(like.device, initial.dtype))
    layer.train(norm.training)
    if has_act:
        layer.drop = getattr(norm, 'drop', nn.Identity())
        layer.act = getattr(norm, 'act', nn.Identity())
    return layer  # type: ignore[no-any-return]


def become(old: nn.Module, new: nn.Module, keep: bool = True) -> None:
    """Turn a module into another one, in place.

    Whatever holds it, in a list or under a second name, then holds the new
    one. Its hooks stay, and with ``keep`` the attributes that new lacks.
    """
    kept = {
        name: value
        for name, value in vars(old).items()
        if (keep and name not in vars(new)) or 'hook' in name
    }
    vars(old).clear()
    old.__class__ = type(new)
    vars(old).update({**vars(new), **kept})


@torch.no_grad()
def _probe(layer: nn.Module) -> tuple[Any, dict[str, Any]]:
    """A copy in float64 with random values, and options for more of them.

    Its own values could hide its function, such as a scale of zero.
    """
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(layer).to_empty(device='cpu').double().eval()
    own = (*layer.parameters(), *layer.buffers())
    for values, before in zip(
        (*probe.parameters(), *probe.buffers()), own, strict=True
    ):
        if values.is_floating_point():
            values.uniform_(0.5, 1.5, generator=generator)
        elif before.is_meta:
            values.zero_()
        else:
            values.copy_(before)  # such as the order of channels
    return probe, dict(generator=generator, dtype=torch.float64)


@torch.no_grad()
def _equal(layer: Any, x: Tensor, expected: Tensor) -> bool:
    try:
        y = layer.forward(x)  # its hooks are not for this input
    except Exception:  # whatever a layer may raise that takes something else
        return False
    return (
        isinstance(y, Tensor)
        and y.shape == expected.shape
        and torch.allclose(y, expected)
    )
