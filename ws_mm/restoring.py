"""Run a model and leave everything as it was."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put modes, buffers and dicts of a model and the random states back.

    In dicts, networks of timm keep what they have computed from parameters.
    """
    dicts = [
        (module, name, value, value.copy())
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is dict and not name.startswith('_')
    ]
    # Some are no longer the same tensors.
    places = [
        (module._buffers, {**module._buffers})
        for module in model.modules()
        if isinstance(module._buffers, dict)  # a scripted one keeps no tensors
    ]
    modes = {module: module.training for module in model.modules()}
    buffers = [(values, values.clone()) for values in model.buffers()]
    states = random.getstate(), np.random.get_state()
    on_gpu = torch.cuda.is_initialized()
    devices = [torch.cuda.current_device()] if on_gpu else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for module, training in modes.items():
                module.training = training
            for module, name, value, content in dicts:
                value.clear()
                value.update(content)
                vars(module)[name] = value
            for place, content in places:
                place.clear()
                place.update(content)
            with torch.no_grad():
                for values, before in buffers:
                    if not (values.is_meta or torch.equal(values, before)):
                        values.copy_(before)
