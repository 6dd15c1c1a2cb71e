"""Keep what a backbone was pretrained with: frozen, or eased into BCN."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .config_edits import Draft, loads
from .config_layers import Cfg, ConfigError, registered
from .config_parts import Part, decide, select
from .converted import CONVERTED, NormEval
from .replacement import BATCH_NORMS
from .shapes import WEIGHTS, batch_norms, build_without_memory

CHOICES = ('auto', 'convert', 'freeze', 'ease')
EASED = dict(type='ws_mm.EasedBCN')


def kept_backbones(
    everything: list[Part], names: Sequence[str], backbone: str
) -> list[Part]:
    """Return the backbones that keep their pretrained function.

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
            if _is_pretrained(part, model)
            and (
                is_eased(part)
                # One that builds what norm_cfg says is converted.
                or (
                    (
                        'norm_eval' in part.accepts
                        or 'norm_cfg' not in part.accepts
                    )
                    and _builds_batch_norms(part)
                )
            )
        ]
    named = select(everything, names) if names else []
    for part in found:
        if part in named:
            raise ConfigError(
                f'{part.name} is among the parts to convert (--parts), and '
                "shall stay as it is (backbone='freeze', --backbone)"
            )
        if backbone == 'ease' and not _is_pretrained(
            part, everything[0].value
        ):
            raise ConfigError(
                f'{part.name} loads no checkpoint of batch norms, which '
                "backbone='ease' continues (--backbone). Name one in its "
                "init_cfg, or use backbone='convert'"
            )
    return found


def _is_pretrained(part: Part, model: Cfg) -> bool:
    # Checkpoints of whole models do not fit the other parts' new layers.
    return bool(
        loads(part.value.get('init_cfg'))
        or any(part.value.get(key) for key in WEIGHTS)
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
    """List the batch norms of a model that are not in frozen backbones."""
    names = [part.name for part in frozen]
    names += [
        name
        for name, module in built.named_modules()
        if isinstance(module, NormEval)
    ]
    inside = tuple(f'{name}.' for name in names)
    return [n for n in batch_norms(built) if not n.startswith(inside)]


def is_eased(part: Part) -> bool:
    """Return whether its norms continue batch norms."""
    norm_cfg: Any = part.get('norm_cfg') or {}
    kind = registered(norm_cfg.get('type'), part.scope)
    return getattr(kind, 'continues_batch_norm', False)


def ease_in(part: Part) -> None:
    """Give a backbone EasedBCN in the place of its batch norms.

    Raises:
        ConfigError: no norm_cfg reaches them.
    """
    if not is_eased(part):
        decide(part, None, EASED, False)
        if 'norm_cfg' not in part.layers or not _builds_batch_norms(part):
            reason = part.why[0] if part.why else 'it has no batch norms'
            raise ConfigError(
                f"{part.name}: {reason}, so that backbone='ease' (--backbone) "
                "cannot be. Use backbone='freeze'"
            )
    part.why.append(
        'keeps its pretrained weights, and EasedBCN continues its batch norms'
    )


def freeze_norms(draft: Draft, parts: list[Part]) -> None:
    """Let the batch norms of parts use their running statistics."""
    why = 'few images would spoil the pretrained statistics'
    for part in parts:
        if 'norm_eval' not in part.accepts:
            if not _builds_batch_norms(part):
                continue
            draft.set((*part.key, 'of'), part.value['type'], why)
            draft.set((*part.key, 'type'), CONVERTED, why)
        draft.set((*part.key, 'norm_eval'), True, why)
        draft.leave(
            part.key,
            'keeps its pretrained weights and batch norms, frozen '
            "(--backbone convert, backbone='convert', replaces them)",
        )
