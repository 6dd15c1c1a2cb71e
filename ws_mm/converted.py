"""Replace batch norms that no key of a config reaches by BCN."""

from collections.abc import Mapping
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from .conversion import convert
from .running_statistics import norm_class
from .shapes import batch_norms

CONVERTED = 'ws_mm.Converted'


@MODELS.register_module(name='Converted')  # type: ignore[untyped-decorator]
def converted(
    of: str | type, norm: Mapping[str, Any] | None = None, **arguments: Any
) -> nn.Module:
    """Build a part of a model, and replace every batch norm in it by BCN.

    For classes that build ``nn.BatchNorm2d`` themselves, whatever their
    config says. It is built and converted before any weights are loaded, so
    optimizers, hooks and checkpoints see the new layers. Norms of other
    kinds stay.

    Example of a config:
        backbone = dict(type='ws_mm.Converted', of='PIDNet', channels=64, ...)

    Args:
        of: type of the part.
        norm: ``norm_cfg`` of BCN, or of another norm with running statistics.
        **arguments: those of the part.

    Raises:
        ValueError: ``norm`` keeps no running statistics of its own.
    """
    kind = (norm or {}).get('type', 'ws_mm.BCN')
    if norm_class(kind) is None:
        raise ValueError(
            f"norm=dict(type={kind!r}) must be of type 'ws_mm.BCN', or of "
            'another norm with running statistics of its own '
            f"(dict(type='ws_mm.Converted', of={of!r}, norm=...))"
        )
    part: nn.Module = MODELS.build(dict(type=of, **arguments))
    if not batch_norms(part):
        return part
    others = [
        name
        for name, module in part.named_modules()
        if isinstance(module, nn.GroupNorm)
    ]
    return convert(part, norm=dict(norm or {}), skip=others)
