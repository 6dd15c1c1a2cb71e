"""What has to happen between training iterations."""

from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from .norm import BCN


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
