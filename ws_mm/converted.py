"""Replace layers that no key of a config reaches."""

import logging
from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from . import replacement
from .arguments import arguments as legal
from .checking import check
from .conversion import check_options, convert, without_type
from .running_statistics import norm_class
from .shapes import WEIGHTS, batch_norms

CONVERTED = 'ws_mm.Converted'


@MODELS.register_module(name='Converted')  # type: ignore[untyped-decorator]
def converted(
    of: str | type,
    norm: Mapping[str, Any] | None = None,
    conv: Mapping[str, Any] | None = None,
    norm_eval: bool | None = None,
    **arguments: Any,
) -> nn.Module:
    """Build a part of a model, and replace every batch norm in it by BCN.

    For classes that build ``nn.BatchNorm2d`` themselves, whatever their
    config says. It is built and converted before ``init_cfg`` loads weights,
    so optimizers, hooks and checkpoints see the new layers. A class that
    loads some when it is built (``pretrained`` and ``checkpoint_path`` of
    timm's) gets a warning. Norms of other kinds stay.

    With ``conv``, plain convolutions become WS convolutions instead. For
    backbones that refuse ``conv_cfg``, as those with ``dcn`` do. Those that
    a norm follows, by name and order, are standardized;
    ``ws_mm.CheckModelHook`` proves it when training begins.

    With ``norm_eval=True``, batch norms that stay use their running
    statistics in training, too. For pretrained backbones whose class has no
    such argument, as those of timm; a class that has one gets it.

    Example of a config:
        backbone = dict(type='ws_mm.Converted', of='PIDNet', channels=64, ...)

    Args:
        of: type of the part.
        norm: ``norm_cfg`` of BCN, or of another norm with running statistics.
        conv: arguments of ``WSConv2d``, ``eps`` and ``eps_mode``, or ``{}``;
            None keeps the convolutions. With ``conv`` or ``norm_eval``,
            batch norms stay, unless ``norm`` is given.
        norm_eval: whether batch norms that stay are in eval mode in training.
        **arguments: those of the part.

    Raises:
        TypeError: ``conv`` has an unknown argument, or is no dict.
        ValueError: ``norm`` keeps no running statistics of its own, or no
            convolution is there that ``conv`` is for.
    """
    check_options(conv, norm)
    kind = (norm or {}).get('type', 'ws_mm.BCN')
    if norm_class(kind) is None:
        raise ValueError(
            f"norm=dict(type={kind!r}) must be of type 'ws_mm.BCN', or of "
            'another norm with running statistics of its own '
            f"(dict(type='ws_mm.Converted', of={of!r}, norm=...))"
        )
    cls = MODELS.get(of) if isinstance(of, str) else of
    if norm_eval is not None and isinstance(cls, type):
        if 'norm_eval' in legal(cls):
            arguments['norm_eval'], norm_eval = norm_eval, None
    part: nn.Module = MODELS.build(dict(type=of, **arguments))
    if norm_eval:
        part.__class__ = replacement.mixed(NormEval, type(part))
    keeps_norms = norm is None and (conv is not None or bool(norm_eval))
    continues = getattr(norm_class(kind), 'continues_batch_norm', False)
    for name in WEIGHTS:
        if (
            arguments.get(name)
            and (conv is not None or not (continues or keeps_norms))
            # mmdet and mmseg make one of pretrained, which is loaded later.
            and not getattr(part, 'init_cfg', None)
        ):
            print_log(
                f'ws_mm.Converted: {type(part).__name__} has loaded weights '
                f'when it was built ({name}={arguments[name]!r}). They are '
                'those of plain convolutions and batch norms, and compute '
                'something else in the new layers. To start from random '
                f'weights, remove {name}',
                logger='current',
                level=logging.WARNING,
            )
    if conv is not None:
        _standardize(part, without_type(conv))
    if keeps_norms or not batch_norms(part):
        return part
    others = [
        name
        for name, module in part.named_modules()
        if isinstance(module, nn.GroupNorm)
    ]
    return convert(part, norm=dict(norm or {}), skip=others)


class NormEval(replacement.Mixin):
    """Base of parts whose batch norms never use statistics of a batch."""

    def train(self, mode: bool = True) -> 'NormEval':
        """Set the mode, and that of the batch norms to eval."""
        super().train(mode)
        for name in batch_norms(self):
            self.get_submodule(name).eval()
        return self


def _standardize(part: nn.Module, conv: Mapping[str, Any]) -> None:
    layers = [
        part.get_submodule(one.name)
        for one in check(part)
        if one.norms and not one.standardized
    ]
    chosen = [
        layer
        for layer in layers
        if replacement.ws_type(layer) and replacement.fan_in(layer) > 1
    ]
    if not chosen:
        raise ValueError(
            f'{type(part).__name__} has no plain convolution with a norm '
            f'after it. Remove conv={dict(conv)!r} '
            "(dict(type='ws_mm.Converted', conv=...))"
        )
    for layer in chosen:
        replacement.standardize(layer, **conv)
    print_log(
        f'ws_mm.Converted: {len(chosen)} convolutions of '
        f'{type(part).__name__} now standardize their filters',
        logger='current',
    )
