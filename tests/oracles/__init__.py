"""Formulas of the norms and filters in ws_mm/zoo, one file for each."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ws_mm import compat

State = dict[str, Tensor]
# Of torch.compile. Versions between 2.1 and this one were not tried.
RECENT_COMPILER = compat._numbers(torch.__version__) >= (2, 10)


@dataclass(frozen=True)
class Case:
    """One method, as the contract's tests need to know it.

    Args:
        name: registered name, without the scope.
        oracle: the formula in float64. Of a norm,
            ``oracle(x, state, training, **wrong)`` returns the output and
            the buffers after it; state holds parameters and buffers by the
            names of the state dict. Buffers that move in the backward are
            those after it. Of a convolution, ``oracle(weight, state,
            **wrong)`` returns the weight that reaches the convolution.
            Autograd through it gives the gradients of the method.
        wrong: arguments that make the oracle wrong, one by one.
        options: constructor arguments, beside the number of channels.
        is_conv: whether it is a convolution.
        one_value: words of the error for one image of one pixel in
            training; '' if that runs.
        one_image: words of the error for one image in training; '' if that
            runs.
        activates: whether it takes the place of the activation, too.
        values: values of parameters and buffers that random ones would
            break, by name, as functions of what was built.
        within: puts the layer into a network that it needs around it.
        refuses: numbers of dimensions of space, of 0, 1 and 3, that raise.
        keeps: why baking cannot fold it, although it keeps statistics.
        forgets: whether a loaded state dict begins its memory anew.
        not_compiled: why ``torch.compile`` cannot take it whole.
        not_recomputed: why a compiled graph cannot checkpoint it.
        saves: tensors as large as the input that it keeps for a backward.
        channels: a number that fits it.
    """

    name: str
    oracle: Callable[..., Any]
    wrong: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    is_conv: bool = False
    one_value: str = ''
    one_image: str = ''
    activates: bool = False
    values: Mapping[str, Callable[[Tensor], Tensor]] = field(
        default_factory=dict
    )
    within: Callable[[nn.Module], nn.Module] = lambda layer: layer
    refuses: tuple[int, ...] = ()
    keeps: str = ''
    forgets: bool = False
    not_compiled: str = ''
    not_recomputed: str = ''
    saves: float = 1
    channels: int = 6


def cases() -> list[Case]:
    """Those of all files of this folder but the ones with an underscore."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith('_'):
            name = f'{__name__}.{module.name}'
            found += importlib.import_module(name).CASES
    return found
