"""What is said about an argument that a layer cannot use.

Configs bring values of any type and names of any spelling, so that every
message names the argument, what is legal and the key of the config.
"""

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch


def refuse_unknown(
    layer: str, key: str, unknown: Mapping[str, Any], legal: Collection[str]
) -> None:
    """Refuse arguments that a layer does not have.

    Args:
        layer: class name of the layer.
        key: of the config, 'norm_cfg' or 'conv_cfg'.
        unknown: arguments left over.
        legal: the names that the layer takes.

    Raises:
        TypeError: there are any; close matches are named.
    """
    if not unknown:
        return
    name, value = next(iter(unknown.items()))
    close = difflib.get_close_matches(name, legal, 1)
    meant = (
        f'did you mean {close[0]!r}?'
        if close
        else f'it takes {", ".join(sorted(legal))}.'
    )
    raise TypeError(
        f'{layer} has no argument {name!r}; {meant} Mend or remove '
        f'{key}=dict({name}={value!r}); a key left over from the config '
        'below goes with _delete_=True'
    )


def check_count(name: str, value: Any, key: str) -> None:
    """Refuse what is no whole number; its size is another question."""
    if isinstance(value, bool) or not hasattr(value, '__index__'):
        raise TypeError(
            f'{name}={value!r} must be a whole number ({key}=dict({name}=...))'
        )


def check_flag(name: str, value: Any, key: str) -> None:
    """Refuse what is neither True nor False: 'False' would count as true."""
    if not isinstance(value, bool):
        raise TypeError(
            f'{name}={value!r} must be True or False ({key}=dict({name}=...))'
        )


def check_eps(value: Any, key: str) -> None:
    """Refuse an eps that is not a finite number of at least 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise (ValueError if number else TypeError)(
            f'eps={value!r} must be a number of at least 0, such as 1e-5 '
            f'({key}=dict(eps=...))'
        )


def check_tensor_options(device: Any, dtype: Any, key: str) -> None:
    """Refuse a device or a dtype that parameters cannot have."""
    floats = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if dtype is not None and not floats:
        raise TypeError(
            f'dtype={dtype!r} must be a floating dtype of torch, such as '
            f'torch.float32 ({key}=dict(dtype=...))'
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f'device={device!r} is no device here ({key}=dict(device=...)): '
            f'{str(error).splitlines()[0]}'
        ) from error
