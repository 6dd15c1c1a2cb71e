"""Ends a run whose loss is no number, and says where."""

import json
import os
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

DIVERGED = 'diverged.json'


@HOOKS.register_module()
class StopWhenDiverged(Hook):
    """Stop at the first loss that is not finite.

    Raises:
        FloatingPointError: with the iteration, after it was written to
            ``diverged.json`` in the work dir.
    """

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Look at the loss of every iteration."""
        loss = (outputs or {}).get('loss')
        if loss is None or bool(torch.isfinite(loss)):
            return
        path = os.path.join(runner.work_dir, DIVERGED)
        with open(path, 'w') as file:
            json.dump({'iteration': runner.iter + 1}, file)
        raise FloatingPointError(
            f'the loss is {loss.item()} at iteration {runner.iter + 1}'
        )
