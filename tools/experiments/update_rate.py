"""Schedules of the momentum of BCN over a training."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ws_mm import BCN

SCHEDULES = ('debiased', 'learning rate', 'both')


@HOOKS.register_module()
class UpdateRateHook(Hook):
    """Lower the momentum of every BCN over a training.

    Formula, at iteration t from 0:
        'debiased': rate = max(momentum, 1 / (t + 1))
        'learning rate': rate = momentum * share
        'both': rate = max(momentum * share, 1 / (t + 1))
    with share = min(1, lr / initial_lr), the highest of the parameter
    groups.

    Convention: 1 / (t + 1) makes the estimates the plain mean of all images
        at first, whatever they started from, so that those of a checkpoint
        are left behind. With the learning rate they settle when training
        does; at a constant rate those that evaluation uses are of the last
        1 / momentum batches or so. ``momentum`` is that of the config again
        after training, and after a resume. Compiled layers compile again
        at each change. Measured in docs/results/momentum.md: the constant
        default was not beaten.

    Args:
        schedule: 'debiased', 'learning rate' or 'both'.

    Raises:
        ValueError: the schedule is unknown.
    """

    def __init__(self, schedule: str = 'debiased') -> None:
        if schedule not in SCHEDULES:
            raise ValueError(
                f'schedule={schedule!r} is not one of '
                f'{", ".join(map(repr, SCHEDULES))} '
                "(custom_hooks=[dict(type='UpdateRateHook', "
                'schedule=...)])'
            )
        self.schedule = schedule

    def before_train(self, runner: Any) -> None:
        """Note the rates of the config."""
        self._momenta = {
            module: module.momentum
            for module in runner.model.modules()
            if isinstance(module, BCN)
        }

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Set the rates of this iteration."""
        share = 1.0
        if self.schedule != 'debiased':
            share = learning_rate_share(runner.optim_wrapper.param_groups)
        floor = 0.0
        if self.schedule != 'learning rate':
            floor = 1 / (runner.iter + 1)
        for layer, momentum in self._momenta.items():
            layer.momentum = max(momentum * share, floor)

    def after_train(self, runner: Any) -> None:
        """Put the rates of the config back."""
        for layer, momentum in self._momenta.items():
            layer.momentum = momentum


def learning_rate_share(groups: Any) -> float:
    """The learning rate over that of the config, at most 1.

    Args:
        groups: of one optimizer, or of several by their names.
    """
    if isinstance(groups, dict):
        groups = [group for own in groups.values() for group in own]
    # Without a param_scheduler there is no initial_lr, and nothing changes.
    shares = [
        group['lr'] / group['initial_lr']
        for group in groups
        if group.get('initial_lr')
    ]
    return min(1.0, max(shares, default=1.0))
