"""Run a model and leave it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put modes and buffers of a model back afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(values, values.clone()) for values in model.buffers()]
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for values, before in buffers:
                if not (values.is_meta or torch.equal(values, before)):
                    values.copy_(before)
