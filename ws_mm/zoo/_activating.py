"""Norms that take the place of the activation, too."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import compat
from ..arguments import check_choice
from ..kernels.plain import at_least_float32
from ..symbolic import recorded
from ._norm import Norm

ACTIVATIONS = frozenset(
    (
        *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
        *(F.relu6, F.hardtanh, F.leaky_relu, F.silu, F.hardswish),
    )
)
OPERATORS = '__iadd__ __isub__ __imul__ __itruediv__ __ipow__ __setitem__'
IN_PLACE = frozenset(
    getattr(Tensor, name)
    for name in dir(Tensor)
    if name in OPERATORS.split()
    or (name[-1] == '_' and name[-2] != '_' and name != 'requires_grad_')
)


class ActivatingNorm(Norm):
    """Base of norms with an activation of their own.

    A subclass defines :meth:`linear` and :meth:`activated`.

    Convention: with ``replaces_act`` a forward returns the values of
        :meth:`linear`. A ReLU, ReLU6, LeakyReLU, SiLU or Hardswish that takes
        this very tensor returns what :meth:`activated` does instead.
        Everything else gets the values, as the sum with the shortcut of a
        block, whose ReLU stays one. A reentrant checkpoint that ends between
        the layer and its activation is an error: it would lose gradients.
    Compiled: with ``replaces_act``, ``torch.compile`` takes it whole since
        torch 2.10, and in parts before; ``torch.export.export`` needs torch
        2.10 and ``strict=True``.

    Args: those of :class:`~ws_mm.zoo._norm.Norm`, and
        replaces_act: True in a network that has activations of its
            own (``ResNet``, ``ConvModule``): the one that directly follows
            becomes that of this layer, and where none does the layer does
            not activate. False: it activates in every forward, for
            ``act_cfg=None``.
    """

    activates = True

    def __init__(
        self, *args: Any, replaces_act: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_choice('replaces_act', replaces_act, (False, True), 'norm_cfg')
        self.replaces_act = replaces_act

    @recorded
    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape (N, num_features, *)."""
        output = Norm.forward(self, input)  # torch 2.1 compiles no super()
        if not self.replaces_act or not input.numel():
            return output
        return _pending(self, input, output)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize, and activate unless a ReLU does."""
        return self.linear(x) if self.replaces_act else self.activated(x)

    def linear(self, x: Tensor) -> Tensor:
        """Result where no activation follows.

        Every parameter gets a gradient from it, as DDP expects it.
        """
        raise NotImplementedError

    def activated(self, x: Tensor, linear: Tensor | None = None) -> Tensor:
        """Result with the activation; linear is that of :meth:`linear`."""
        raise NotImplementedError


class _Pending(Tensor):
    """Values of :meth:`ActivatingNorm.linear`, before an activation.

    Every other operation returns plain tensors. A sum with a shortcut, in
    place, is no longer the result of the norm, although in the same memory.
    """

    layer: ActivatingNorm
    input: Tensor
    plain: Tensor
    changed: bool

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Activate in the place of an activation; else use the values."""
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get('input')
        is_pending = isinstance(first, _Pending)
        if func in ACTIVATIONS and is_pending and not first.changed:
            return _activated(first)
        output = func(*_plain(args), **_plain(kwargs))
        if is_pending and func in IN_PLACE:
            first.changed = True
        return output


def _pending(layer: ActivatingNorm, input: Tensor, plain: Tensor) -> Tensor:
    if plain.__class__ is not Tensor:
        raise TypeError(
            f'{type(layer).__name__} with replaces_act=True cannot run on a '
            f'{type(plain).__name__}. For torch.export.export, set strict=True'
        )
    pending = compat.as_subclass(plain, _Pending)
    pending.layer, pending.plain, pending.changed = layer, plain, False
    # A view, so that ws_mm.check sees the layer read the convolution, not
    # the activation.
    pending.input = input.view_as(input)
    return pending


def _plain(value: Any) -> Any:
    if isinstance(value, _Pending):
        return value.plain
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([_plain(each) for each in value])
    return value


def _activated(pending: _Pending) -> Tensor:
    layer, plain = pending.layer, pending.plain
    if not compat.is_compiling():
        needed = compat.own_requires_grad(pending)
        if needed and not (plain.requires_grad and torch.is_grad_enabled()):
            raise RuntimeError(
                'a reentrant activation checkpoint ends between this '
                f'{type(layer).__name__} and the activation that it replaces, '
                'which would lose gradients. Checkpoint both together, or '
                'with use_reentrant=False'
            )
    x = at_least_float32(pending.input)
    return layer.activated(x, at_least_float32(plain)).to(plain.dtype)
