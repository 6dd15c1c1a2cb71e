"""Run a model and leave everything as it was."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put modes and buffers of a model and the random states back."""
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
            with torch.no_grad():
                for values, before in buffers:
                    if not (values.is_meta or torch.equal(values, before)):
                        values.copy_(before)
