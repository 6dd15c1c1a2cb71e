"""The base of filters that keep the function of plain ones."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..arguments import reject_unknown
from ..checkpoint import CENTERED
from ..conv import WSConv2d, report_filters
from ..functional import standardize_weight


class Filters(WSConv2d):
    """Base: values per filter, which the checkpoint of a plain one lacks.

    A subclass registers parameters or buffers of its own and defines
    :meth:`values_of`. It names ``nn.Conv2d`` as a base again: the host's
    initializers with ``layer='Conv2d'`` read the names of direct bases.

    State: a checkpoint with ``weight`` alone is given these values when it
        is loaded. One of a WS network is standardized first, with the default
        eps, one of centered filters centered: the function stays. If it has
        no versions of its layers, it counts as plain, with a message.
    """

    keeps_plain = True
    _of_no_version = (
        'the checkpoint has no versions of its layers (a prefix in init_cfg '
        'drops them), and its filters are taken for plain ones. If they were '
        'trained standardized, they compute something else here: load such a '
        'checkpoint without a prefix'
    )

    def values_of(self, weight: Tensor) -> dict[str, Tensor]:
        """The own values with which the layer computes these filters."""
        raise NotImplementedError

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, *args: Any
    ) -> None:
        weight = state_dict.get(f'{prefix}weight')
        own = {*self._parameters, *self._buffers} - {'weight', 'bias'}
        if weight is not None and not any(
            f'{prefix}{name}' in state_dict for name in own
        ):
            version = metadata.get('version')
            if version is None:
                report_filters(
                    self._of_no_version, prefix[:-1], args[-1], logging.INFO
                )
            elif version == CENTERED:
                weight = weight - weight.mean((1, 2, 3), keepdim=True)
            elif self._fits(version):
                weight = standardize_weight(weight)
            state_dict[f'{prefix}weight'] = weight
            for name, values in self.values_of(weight).items():
                state_dict[f'{prefix}{name}'] = values
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def reject_others(cls: type, arguments: Mapping[str, Any]) -> None:
    """Reject what a class does not take, though its base does."""
    legal = inspect.signature(cls).parameters
    unknown = {k: arguments[k] for k in arguments if k not in legal}
    reject_unknown(cls.__name__, 'conv_cfg', unknown, legal)
