"""What has to happen between training iterations."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from .norm import BCN
from .surgery import check


@HOOKS.register_module()
class SyncEstimatesHook(Hook):
    """Average the estimates of all BCN layers over the ranks.

    After every training iteration, in one collective for the whole model.
    The estimates move linearly with the batch moments, so the average of
    ranks that started equal is what one process would hold after the
    concatenated batch (ranks of equal batch size, one call per layer).
    Without it each rank trains and validates with its own estimates, and
    the checkpoint holds those of rank 0.
    """

    # Before CheckpointHook (VERY_LOW) saves and before any validation.
    priority = 'NORMAL'

    def before_train(self, runner: Any) -> None:
        """Find the layers once, after the model was wrapped."""
        self._buffers = estimate_buffers(runner.model)

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Average the estimates."""
        average_over_ranks(self._buffers)


@HOOKS.register_module()
class CheckModelHook(Hook):
    """Look for standardized convolutions without a norm before training.

    It judges by names and order, see :func:`~ws_mm.surgery.check`, which a
    model with unusual names can mislead; ``tools/check_model.py`` runs the
    model instead.

    Args:
        on_mistake: 'raise' to stop before the first step, or 'print'.

    Raises:
        ValueError: ``on_mistake`` is unknown; before training, in 'raise',
            with every mistake and what mends it.
    """

    def __init__(self, on_mistake: str = 'raise') -> None:
        if on_mistake not in ('raise', 'print'):
            raise ValueError(
                f"on_mistake={on_mistake!r} must be 'raise' or 'print' "
                "(custom_hooks=[dict(type='ws_mm.CheckModelHook', "
                'on_mistake=...)])'
            )
        self.on_mistake = on_mistake

    def before_train(self, runner: Any) -> None:
        """Check the model that is about to be trained."""
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        mistakes = check(model).mistakes
        if not mistakes:
            return
        message = '\n'.join(
            (
                'The model standardizes convolutions that nothing normalizes:',
                *mistakes,
                "If this is not so, set on_mistake='print' in CheckModelHook.",
            )
        )
        if self.on_mistake == 'raise':
            raise ValueError(message)
        print_log(message, logger='current', level=logging.WARNING)


def estimate_buffers(model: nn.Module) -> list[torch.Tensor]:
    """The running estimates of a model's BCN layers in 'estimate' mode."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, BCN) and module.mode == 'estimate'
        for buffer in (module.running_mean, module.running_var)
    ]


@torch.no_grad()
def average_over_ranks(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in one collective."""
    if not tensors or not (dist.is_available() and dist.is_initialized()):
        return
    world = dist.get_world_size()
    if world == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
