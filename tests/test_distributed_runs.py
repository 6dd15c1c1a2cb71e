"""Trainings of mmengine's Runner in two gloo processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.dist import get_rank
from proofs import small_run
from torch import Tensor, nn

from ws_mm import BCN, WSConv2d, running_statistics

HOOK = dict(type='ws_mm.SyncEstimatesHook')
# As mmdet's and mmyolo's configs have it: before hooks of priority NORMAL.
EMA = dict(type='EMAHook', momentum=0.1, priority=49)


def train(
    rank: int, folder: Path, by_epoch: bool, hooks: list[Any], **options: Any
) -> list[dict[str, Tensor]]:
    """Train; the statistics of each validation of this rank."""
    assert get_rank() == rank
    torch.manual_seed(1)
    running_statistics._reported.clear()  # of earlier tests in this process
    model = small_run.Small(
        WSConv2d(3, 8, 3, bias=False),
        BCN(8, 4),
        nn.ReLU(),
        WSConv2d(8, 8, 3, bias=False),
        BCN(8, 4),
        nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    )
    # Two iterations of two processes are an epoch.
    images = small_run.make_data(4)
    options |= dict(by_epoch=by_epoch, ranks=True)
    small_run.train(folder, model, images, hooks, **options)
    return [running(seen) for seen in model.validated[:: len(images) // 2]]


def running(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The running statistics among the tensors of a model."""
    return {k: v for k, v in state.items() if 'running' in k}


def saved(folder: Path) -> list[dict[str, Tensor]]:
    """The estimates in each checkpoint, in their order."""
    found = [
        running(torch.load(path, weights_only=False)['state_dict'])
        for path in sorted(folder.glob('*_[0-9].pth'))
    ]
    assert len(found) == 2
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    assert left.keys() == right.keys()
    assert len(left) == 4
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize('by_epoch', [True, False])
@pytest.mark.parametrize(
    'others', [[], [EMA], [{**EMA, 'update_buffers': True}]], ids=str
)
def test_what_is_saved_was_validated(by_epoch, others, world, tmp_path):
    ranks = world(2).run(train, tmp_path, by_epoch, [*others, HOOK])
    checkpoints = saved(tmp_path)
    assert len(ranks[0]) == len(ranks[1]) == 2
    for i, checkpoint in enumerate(checkpoints):
        assert same(ranks[0][i], ranks[1][i])
        assert same(ranks[0][i], checkpoint)
    assert not same(*checkpoints)


def test_a_resumed_training_ends_as_the_uninterrupted(world, tmp_path):
    whole, halves = tmp_path / 'whole', tmp_path / 'halves'
    world(2).run(train, whole, False, [HOOK])
    world(2).run(train, halves, False, [HOOK], steps=2)
    world(2).run(train, halves, False, [HOOK], resume=True)
    for left, right in zip(saved(whole), saved(halves), strict=True):
        assert same(left, right)


@pytest.mark.parametrize(
    ('others', 'broadcast'),
    [([HOOK], False), ([dict(type='SyncBuffersHook')], False), ([], True)],
    ids=str,
)
def test_the_hook_twice_or_beside_what_the_host_has_changes_nothing(
    others, broadcast, world, tmp_path
):
    plain, beside = tmp_path / 'plain', tmp_path / 'beside'
    world(2).run(train, plain, False, [HOOK])
    world(2).run(
        train, beside, False, [*others, HOOK], broadcast_buffers=broadcast
    )
    for left, right in zip(saved(plain), saved(beside), strict=True):
        for name, values in left.items():
            torch.testing.assert_close(values, right[name])


@pytest.mark.parametrize('hooks', [[], [HOOK]], ids=['without', 'with'])
def test_the_log_names_the_missing_hook_once(hooks, world, tmp_path):
    world(2).run(train, tmp_path, False, hooks, steps=2)
    logs = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert 'has no metainfo' in logs  # another warning: the log is read
    assert logs.count("dict(type='ws_mm.SyncEstimatesHook')") == (not hooks)
