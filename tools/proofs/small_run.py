"""A small training of mmengine's Runner, in one process or in each rank."""

from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import Tensor, nn


class Small(BaseModel):
    """A segmentor of two classes that notes what it is given and has.

    Args:
        *layers: layers of its body, from 3 channels to 2.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.trained: list[float] = []  # the sum of each batch
        self.validated: list[dict[str, Tensor]] = []  # state dicts

    def forward(self, inputs: Tensor, target: Tensor, mode: str) -> Any:
        """Return the loss of a batch, or one score for it."""
        logits = self.body(inputs)
        if mode == 'loss':
            if torch.is_grad_enabled():
                self.trained.append(inputs.sum().item())
            return dict(loss=nn.functional.cross_entropy(logits, target))
        self.validated.append(
            {k: v.detach().clone() for k, v in self.state_dict().items()}
        )
        return [dict(score=logits.mean().item())]


class Score(BaseMetric):
    """The sum of the scores."""

    def process(self, data_batch: Any, data_samples: list[Any]) -> None:
        """Keep the scores."""
        self.results += data_samples

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Add them up."""
        return dict(score=sum(result['score'] for result in results))


class Images(list):
    """A data set that can be given attributes."""


def make_data(count: int) -> Images:
    """Images whose mean and scale differ, with random targets."""
    generator = torch.Generator().manual_seed(5)
    return Images(
        dict(
            inputs=torch.randn(3, 9, 9, generator=generator) * (1 + i) + i,
            target=torch.randint(2, (5, 5), generator=generator),
        )
        for i in range(count)
    )


def train(
    folder: Path,
    model: Small,
    images: list[Any],
    hooks: list[Any],
    *,
    by_epoch: bool = False,
    steps: int = 4,
    batch_size: int = 1,
    val_batch_size: int = 1,
    shuffle: bool = True,
    workers: int = 0,
    drop_last: bool = False,
    resume: bool = False,
    ranks: bool = False,
    broadcast_buffers: bool = False,
    randomness: dict[str, Any] | None = None,
    **checkpoint: Any,
) -> Small:
    """Train, validate and save after every second step.

    Args:
        folder: work dir.
        model: model to train.
        images: data set of training, of validation and of a test.
        hooks: custom hooks.
        by_epoch: train half as many epochs as steps; validate and save
            after each.
        steps: iterations in all.
        batch_size: images per step and process.
        val_batch_size: images per step of validation.
        shuffle: draw the images in a random order.
        workers: processes that load the images.
        drop_last: leave out a last batch of fewer images in training.
        resume: go on from the last checkpoint.
        ranks: run in a process group, wrapped in DistributedDataParallel.
        broadcast_buffers: argument of that wrapper.
        randomness: that of the Runner, by default one seed.
        **checkpoint: more arguments of the CheckpointHook.

    Returns:
        The model.
    """
    loader = dict(
        num_workers=workers,
        persistent_workers=workers > 0,
        dataset=images,
        collate_fn=dict(type='default_collate'),
    )
    if by_epoch:
        loop = dict(by_epoch=True, max_epochs=steps // 2, val_interval=1)
    else:
        loop = dict(by_epoch=False, max_iters=steps, val_interval=2)
    endless = shuffle and not by_epoch
    sampler = 'InfiniteSampler' if endless else 'DefaultSampler'
    wrapped = model
    if ranks:
        # On a CPU the Runner's own wrapper wants a config for it.
        wrapped = MMDistributedDataParallel(
            model, broadcast_buffers=broadcast_buffers
        )
    validation = dict(
        **loader,
        batch_size=val_batch_size,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    # Without a folder mmengine leaves one where it was called from.
    collect = str(folder / 'collect')
    runner = Runner(
        model=wrapped,
        work_dir=str(folder),
        train_dataloader=dict(
            **loader,
            batch_size=batch_size,
            drop_last=drop_last,
            sampler=dict(type=sampler, shuffle=shuffle),
        ),
        val_dataloader=validation,
        test_dataloader=validation,
        train_cfg=loop,
        val_cfg=dict(),
        test_cfg=dict(),
        val_evaluator=Evaluator(Score(collect_dir=collect)),
        test_evaluator=Evaluator(Score(collect_dir=collect)),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
        default_hooks=dict(
            logger=None,
            checkpoint={
                'type': 'CheckpointHook',
                'by_epoch': by_epoch,
                'interval': 1 if by_epoch else 2,
                **checkpoint,
            },
        ),
        custom_hooks=hooks,
        launcher='pytorch' if ranks else 'none',
        resume=resume,
        randomness=randomness or dict(seed=3),
        log_level='WARNING',
        experiment_name=f'{folder}-{resume}-{steps}'.replace('/', '-'),
    )
    runner.train()
    if workers:
        # The garbage collector, which finds them in the cycles of a Runner,
        # ends their queues first and then waits 5 seconds for each worker.
        for loop in (runner.train_loop, runner.val_loop):
            loop.dataloader._iterator._shutdown_workers()
    return model
