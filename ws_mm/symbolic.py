"""Record the layers as leaves for ``torch.fx.symbolic_trace``."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx

# Of mmengine, which takes a convolution and its norm apart.
REFUSED = 'turn_on_efficient_conv_bn_eval'
Forward = TypeVar('Forward', bound=Callable[..., Any])


def recorded(forward: Forward) -> Forward:
    """Record calls of a layer as a whole, as torch does for its own layers.

    Args:
        forward: method of the layer.

    Raises:
        TypeError: ``efficient_conv_bn_eval`` of mmengine traces, or the layer
            itself is traced.
    """

    @functools.wraps(forward)
    def run(layer: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, fx.Proxy):
            return forward(layer, input, *args, **kwargs)
        name = type(layer).__name__
        frame: Any = sys._getframe()
        while frame is not None:
            if frame.f_code.co_name.startswith(REFUSED):
                raise TypeError(
                    f'{name} cannot be traced by efficient_conv_bn_eval of a '
                    'config, which scales filters that are standardized '
                    'again. Take the modules with this layer out of the '
                    'list, or bake the model first (ws_mm.bake, '
                    'tools/deployment/bake.py)'
                )
            frame = frame.f_back
        path = input.tracer.path_of_module(layer)  # type: ignore[attr-defined]
        if not path:
            raise TypeError(
                f'{name} is recorded as a call of it, which needs a module '
                'that holds it: trace torch.nn.Sequential(layer)'
            )
        return input.tracer.create_proxy(
            'call_module', path, (input, *args), kwargs
        )

    return run  # type: ignore[return-value]
