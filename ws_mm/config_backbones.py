"""Keep a backbone as it was pretrained, with its batch norms frozen."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .config_edits import Draft, loads
from .config_layers import Cfg, ConfigError, registered
from .config_parts import Part, select
from .replacement import BATCH_NORMS
from .shapes import batch_norms, build_without_memory

CHOICES = ('auto', 'convert', 'freeze')


def frozen_backbones(
    everything: list[Part], names: Sequence[str], backbone: str
) -> list[Part]:
    """Return the backbones that keep their layers.

    Args:
        everything: parts of the model, the model first.
        names: parts that were asked for.
        backbone: what to do with backbones, see :func:`ws_mm.apply_norm`.

    Raises:
        ConfigError: ``backbone`` is another word, or what it asks for
            cannot be.
    """
    if backbone not in CHOICES:
        raise ConfigError(
            f'backbone={backbone!r} is not one of '
            f'{", ".join(map(repr, CHOICES))} (--backbone)'
        )
    if backbone == 'convert' or (backbone == 'auto' and names):
        return []
    found = [p for p in everything if p.roles[-1] == 'backbone']
    if backbone == 'auto':
        model = everything[0].value
        return [
            part
            for part in found
            if 'norm_eval' in part.accepts
            and _is_pretrained(part, model)
            and _builds_batch_norms(part)
        ]
    named = select(everything, names) if names else []
    for part in found:
        if part in named:
            raise ConfigError(
                f'{part.name} is among the parts to convert (--parts), and '
                "shall stay as it is (backbone='freeze', --backbone)"
            )
        if 'norm_eval' not in part.accepts and _builds_batch_norms(part):
            raise ConfigError(
                f'{part.cls.__name__} takes no norm_eval, so that its batch '
                "norms cannot be frozen. Use backbone='convert' (--backbone)"
            )
    return found


def _is_pretrained(part: Part, model: Cfg) -> bool:
    # Checkpoints of whole models do not fit the other parts' new layers.
    return bool(
        loads(part.value.get('init_cfg'))
        or part.value.get('pretrained')
        or (len(part.key) == 2 and model.get('pretrained'))
    )


def _builds_batch_norms(part: Part) -> bool:
    norm_cfg: Any = part.get('norm_cfg') or {}
    kind = registered(norm_cfg.get('type'), part.scope)
    if kind is not None:
        return issubclass(kind, BATCH_NORMS)
    try:
        built: nn.Module = build_without_memory(part.value, part.scope)
    # What is wrong with it, the build of the model tells.
    except Exception:
        return False
    return bool(batch_norms(built))


def outside(parts: list[Part], others: list[Part]) -> list[Part]:
    """Return the parts that are none of the others, nor below one."""
    keys = [other.key for other in others]
    return [
        part
        for part in parts
        if not any(part.key[: len(key)] == key for key in keys)
    ]


def trained_batch_norms(built: nn.Module, frozen: list[Part]) -> list[str]:
    """List the batch norms of a model that are not in these backbones."""
    inside = tuple(f'{part.name}.' for part in frozen)
    return [n for n in batch_norms(built) if not n.startswith(inside)]


def freeze_norms(draft: Draft, parts: list[Part]) -> None:
    """Let the batch norms of parts use their running statistics."""
    for part in parts:
        if 'norm_eval' in part.accepts:
            why = 'few images would spoil the pretrained statistics'
            draft.set((*part.key, 'norm_eval'), True, why)
        draft.leave(
            part.key,
            'keeps its pretrained weights and batch norms, frozen '
            "(--backbone convert, backbone='convert', replaces them)",
        )
