"""Running statistics measured over a loader, by the function and the hook."""

import copy
import importlib
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import tiny_runs
import torch
from comparison import TOLERANCE, disagreements
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import HOOKS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from proofs import small_run
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
)

import ws_mm
from ws_mm import BCN, WSConv2d

WIDE = TOLERANCE[torch.float64]


def make_batches(*sizes: int, channels: int = 8, seed: int = 2):
    """Batches of unequal sizes whose channels differ in mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.2, 3, channels).view(-1, 1, 1)
    return [
        torch.randn(size, channels, 5, 6, generator=generator).double()
        * scales
        * (1 + number)
        + number
        for number, size in enumerate(sizes)
    ]


def randomized(*layers: nn.Module) -> nn.Sequential:
    """Layers whose affines and statistics are not their defaults."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if values.is_floating_point():
                values.copy_(torch.rand(values.shape, generator=generator))
                if 'mean' in name or 'bias' in name:
                    values.mul_(4).sub_(2)
                else:
                    values.add_(0.3)
    return model


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.named_buffers()}


def of_all_values(batches: list[Tensor]) -> dict[str, Tensor]:
    """Moments of every value of every batch, from the definition."""
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in batches], 1)
    mean = values.sum(1) / values.shape[1]
    squares = ((values - mean[:, None]) ** 2).sum(1)
    return dict(running_mean=mean, running_var=squares / values.shape[1])


def within_batches(batches: list[Tensor]) -> dict[str, Tensor]:
    """Mean, and mean of the unbiased variances, by number of values."""
    counts = [x.numel() / x.shape[1] for x in batches]
    parts = [
        reference.variance(x.transpose(0, 1).flatten(1), 1, unbiased=True)
        for x in batches
    ]
    weighted = sum(n * v for n, v in zip(counts, parts, strict=True))
    mean = of_all_values(batches)['running_mean']
    return dict(running_mean=mean, running_var=weighted / sum(counts))


def test_estimates_are_the_moments_of_all_values():
    first, second = BCN(8, 4, momentum=0.3), BCN(8, 2, outer_affine='channel')
    model = randomized(first, second).eval()
    first.train()  # modes differ
    batches = make_batches(1, 3, 2)
    initial = state(first)
    # The second layer sees what the first makes of its mean so far.
    seen = []
    for number in range(len(batches)):
        so_far = {**initial, **of_all_values(batches[: number + 1])}
        output, _ = reference.batch_channel_norm(
            batches[number], so_far, 4, training=False, momentum=0
        )
        seen.append(output)
    ws_mm.update_estimates(model, batches)
    for layer, inputs in ((first, batches), (second, seen)):
        assert not disagreements(buffers(layer), of_all_values(inputs), WIDE)
    assert (first.training, second.training) == (True, False)
    assert (first.momentum, second.momentum) == (0.3, 0.01)
    for name, values in first.named_parameters():
        assert torch.equal(values, initial[name])
    # Not each batch alike.
    alike = of_all_values([x[:1] for x in batches])
    assert disagreements(buffers(first), alike, 1e-3)


@pytest.mark.parametrize('mode', ['batch', 'sync_batch'])
def test_batch_modes_get_what_update_bn_gives_batch_norm(mode):
    model = randomized(BCN(8, 4, mode=mode), nn.BatchNorm2d(8))
    plain = copy.deepcopy(model)
    plain[0] = nn.BatchNorm2d(8).double()
    batches = make_batches(2, 2, 2)
    ws_mm.update_estimates(model, [(x, 'label') for x in batches])
    update_bn([(x, 'label') for x in batches], plain)
    expected = buffers(plain[0])
    assert expected.pop('num_batches_tracked') == 3
    assert not disagreements(buffers(model[0]), expected, WIDE)
    # Of a BatchNorm alone, with its count.
    alone, twin = (randomized(nn.BatchNorm2d(8)) for _ in range(2))
    ws_mm.update_estimates(alone, batches, num_batches=2)
    update_bn(batches[:2], twin)
    torch.testing.assert_close(state(alone), state(twin))


@pytest.mark.parametrize(
    'layer', [BCN(8, 4, mode='batch'), nn.BatchNorm2d(8)], ids=['BCN', 'BN']
)
def test_unequal_batches_weigh_by_their_values(layer):
    model = randomized(copy.deepcopy(layer))
    batches = make_batches(1, 4, 2)
    batches[0] = batches[0][..., :2]  # a smaller map
    batches.insert(1, batches[0][:0])  # a part without RoIs
    if isinstance(layer, nn.BatchNorm2d):
        del batches[1]  # which torch refuses
    ws_mm.update_estimates(model, iter(batches))
    actual = {k: v for k, v in buffers(model[0]).items() if 'num' not in k}
    expected = within_batches([x for x in batches if len(x)])
    assert not disagreements(actual, expected, WIDE)


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16], ids=str)
def test_half_precision_is_measured_in_more(
    dtype: torch.dtype, mode: str
) -> None:
    layer = BCN(8, 4, mode=mode)
    batches = [x.to(dtype) for x in make_batches(2, 3)]
    ws_mm.update_estimates(nn.Sequential(layer), batches)
    moments = of_all_values if mode == 'estimate' else within_batches
    expected = moments([x.double() for x in batches])
    # Moments in the precision of the inputs have three digits, or two.
    assert not disagreements(
        buffers(layer), expected, TOLERANCE[torch.float32]
    )


def test_one_value_per_channel_is_measured() -> None:
    # As the hooks find it in a layer that raises only when it runs.
    layer = BCN(8, 4, mode='batch')
    x = torch.randn(1, 8, 1, 1)
    count, found = layer.measure(x)
    assert count == 1
    assert torch.equal(found['running_mean'], x.flatten())
    assert torch.equal(found['running_var'], torch.zeros(8))


def test_update_bn_skips_bcn():
    # What the documentation says of it; ours is for this.
    model = randomized(BCN(8, 4))
    before = state(model)
    update_bn(make_batches(2), model)
    torch.testing.assert_close(state(model), before)


class Strange(nn.Module):
    """A part with a buffer that training moves, and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('steps', torch.zeros(1))
        self.frozen = BCN(8, 4)
        self.unreached = BCN(8, 4)

    def train(self, mode: bool = True):
        super().train(mode)
        self.frozen.eval()  # as frozen_stages
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            np.random.rand(random.randrange(3) + 1)
        return nn.functional.dropout(self.frozen(x), 0.5, self.training)


@pytest.mark.filterwarnings('ignore')
def test_only_running_statistics_change(caplog):
    model = randomized(Strange(), nn.BatchNorm2d(8))
    model.eval()
    before = state(model)
    numbers = random.getstate(), np.random.get_state()[1].tolist()
    drawn = torch.get_rng_state()
    ws_mm.update_estimates(model, make_batches(2, 1))
    after = state(model)
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert moved == {
        '1.running_mean',
        '1.running_var',
        '1.num_batches_tracked',
    }
    assert not any(module.training for module in model.modules())
    assert numbers[0] == random.getstate()
    assert numbers[1] == np.random.get_state()[1].tolist()
    assert torch.equal(drawn, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in model.modules())


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError('out of memory')


def test_error_restores_the_model():
    model = randomized(BCN(8, 4), nn.BatchNorm2d(8), Broken()).eval()
    before = state(model)
    with pytest.raises(RuntimeError, match='out of memory'):
        ws_mm.update_estimates(model, make_batches(2))
    del model[2]
    exhausted = iter(())
    for loader in ([], exhausted):
        with pytest.raises(ValueError, match='0 batches.*drop_last=True'):
            ws_mm.update_estimates(model, loader)
    with pytest.raises(ValueError, match='3 batches.*none reached'):
        ws_mm.update_estimates(
            model, make_batches(1, 1, 1), forward=lambda model, batch: None
        )
    for wrong in (0, -1, '3'):
        with pytest.raises(ValueError, match=f'num_batches={wrong!r} must be'):
            ws_mm.update_estimates(model, make_batches(1), num_batches=wrong)
    with pytest.raises(TypeError, match='a dict, which cannot .*forward='):
        ws_mm.update_estimates(model, [dict(image=1)], 'cpu')
    nothing_finite = [b * torch.nan for b in make_batches(1, 1)]
    with pytest.raises(ValueError, match='finite value in 2 batches'):
        ws_mm.update_estimates(model, nothing_finite)
    torch.testing.assert_close(state(model), before)
    assert not model[0].training
    ws_mm.update_estimates(nn.Conv2d(3, 3, 1), [])  # nothing to update


@pytest.mark.parametrize('bad', [torch.inf, torch.nan])
def test_channels_that_are_not_finite_are_left_out(bad):
    model = randomized(BCN(8, 4))
    batches = make_batches(2, 1)
    expected = of_all_values(batches)
    for name, values in of_all_values(batches[1:]).items():
        expected[name][3] = values[3]
    batches[0][1, 3, 2, 2] = bad
    ws_mm.update_estimates(model, batches)
    assert not disagreements(buffers(model[0]), expected, WIDE)


@pytest.mark.parametrize('bad', [torch.inf, torch.nan])
def test_rows_that_are_not_finite_are_left_out(bad: float) -> None:
    """A value of one channel is in the covariances of all its group."""
    norm = MODELS.build(dict(type='ws_mm.IterNorm', num_features=8))
    model = nn.Sequential(norm).double()
    batches = make_batches(2, 1)
    batches[0][1, 3, 2, 2] = bad
    ws_mm.update_estimates(model, batches)
    found = buffers(norm)
    ws_mm.update_estimates(model, batches[1:])
    assert not disagreements(found, buffers(norm), WIDE)


def test_a_channel_that_is_never_finite_keeps_its_statistics() -> None:
    model = randomized(BCN(8, 4))
    before, batches = buffers(model[0]), make_batches(2, 1)
    expected = of_all_values(batches)
    for name, values in expected.items():
        values[3] = before[name][3]
    for batch in batches:
        batch[0, 3, 2, 2] = torch.nan
    ws_mm.update_estimates(model, batches)
    assert not disagreements(buffers(model[0]), expected, WIDE)


def test_a_batch_norm_without_statistics_is_passed_over() -> None:
    plain = nn.BatchNorm2d(8, track_running_stats=False)
    model = randomized(plain, BCN(8, 4))
    batches = make_batches(2, 1)
    ws_mm.update_estimates(model, batches)
    with torch.no_grad():
        expected = of_all_values([plain(x) for x in batches])
    assert not disagreements(buffers(model[1]), expected, WIDE)


def test_a_compiled_model_is_measured() -> None:
    model, batches = randomized(BCN(8, 4)).eval(), make_batches(2, 1)
    compiled = torch.compile(model, backend='eager')
    with torch.no_grad():
        compiled(batches[0])  # such a graph runs no hook that comes later
    ws_mm.update_estimates(compiled, batches)
    assert not disagreements(buffers(model[0]), of_all_values(batches), WIDE)


def test_a_layer_that_sees_nothing_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        'ws_mm.estimates.print_log', lambda text, **_: said.append(text)
    )
    model = randomized(BCN(8, 4), BCN(8, 4), nn.BatchNorm2d(8))
    ws_mm.update_estimates(model, make_batches(2, 1))
    assert not said
    before = state(model)
    ws_mm.update_estimates(
        model, make_batches(2, 1), forward=lambda model, x: model[1](x)
    )
    (line,) = said
    assert line.startswith('2 layers (0, 2) saw no value in 2 batches')
    kept = {k for k, v in state(model).items() if torch.equal(v, before[k])}
    moved = {'1.running_mean', '1.running_var'}
    assert kept == before.keys() - moved


class ByKeyword(nn.Sequential):
    """Layers that take their input by its name."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(input=x)
        return x


def test_layers_that_take_their_input_by_keyword_are_measured() -> None:
    model = randomized(BCN(8, 4), nn.BatchNorm2d(8))
    twin = ByKeyword(*copy.deepcopy(model))
    for each in (model, twin):
        ws_mm.update_estimates(each, make_batches(2, 1))
    torch.testing.assert_close(buffers(twin), buffers(model))


class Held:
    """A batch that is on its device once it was moved."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def to(self, device: str) -> Tensor:
        assert device == 'cpu'
        return self.images


def test_batches_move_to_the_device() -> None:
    model, batches = randomized(BCN(8, 4)), make_batches(2, 1)
    held = [(Held(batch), 'label') for batch in batches]
    ws_mm.update_estimates(model, held, 'cpu')
    assert not disagreements(buffers(model[0]), of_all_values(batches), WIDE)


def test_averaged_weights_of_torch():
    model = randomized(nn.Conv2d(8, 8, 1), BCN(8, 4))
    average = AveragedModel(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
        average.update_parameters(model)
    batches = make_batches(2, 1)
    ws_mm.update_estimates(average, batches)
    with torch.no_grad():
        inputs = [average.module[0](x) for x in batches]
    expected = of_all_values(inputs)
    assert not disagreements(buffers(average.module[1]), expected, WIDE)


def of_one_rank(rank: int, mode: str, wrap: bool) -> dict[str, Tensor]:
    model = randomized(BCN(8, 4, mode=mode))
    wrapped = model
    if wrap:
        wrapped = nn.parallel.DistributedDataParallel(model)
    own = make_batches(*(2, 1)[: 2 - rank], seed=rank)
    if wrap and rank:
        own = []  # DDP's own broadcasts would wait for this rank
    if mode == 'sync_batch':
        own = make_batches(2 + rank, 1, seed=rank)
    ws_mm.update_estimates(wrapped, own)
    return buffers(model[0])


@pytest.mark.parametrize('mode', ['estimate', 'batch', 'sync_batch'])
def test_several_processes_measure_all_batches(mode, world):
    ranks = world(2).run(of_one_rank, mode, mode == 'estimate')
    if mode == 'sync_batch':
        pairs = [make_batches(2 + r, 1, seed=r) for r in range(2)]
        expected = within_batches(
            [torch.cat(parts) for parts in zip(*pairs, strict=True)]
        )
    else:
        every = make_batches(2, 1, seed=0)
        if mode == 'batch':
            every += make_batches(2, seed=1)
        pooled = of_all_values if mode == 'estimate' else within_batches
        expected = pooled(every)
    for name, values in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert not disagreements({name: ranks[0][name]}, {name: values}, WIDE)


def compiled_rank(rank: int, outside: bool) -> dict[str, Tensor]:
    model = randomized(BCN(8, 4)).eval()
    if outside:
        ranks = nn.parallel.DistributedDataParallel(model)
        wrapped = torch.compile(ranks, backend='eager')
    else:
        compiled = torch.compile(model, backend='eager')
        wrapped = nn.parallel.DistributedDataParallel(compiled)
    own = make_batches(2, 1, seed=rank)
    with torch.no_grad():
        wrapped(own[0])  # such a graph runs no hook that comes later
    ws_mm.update_estimates(wrapped, own)
    return buffers(model[0])


@pytest.mark.parametrize('outside', [True, False])
def test_a_compiled_model_is_measured_by_ranks(outside, world):
    every = [x for rank in range(2) for x in make_batches(2, 1, seed=rank)]
    for found in world(2).run(compiled_rank, outside):
        assert not disagreements(found, of_all_values(every), WIDE)


def batch_norm_rank(rank: int) -> dict[str, Tensor]:
    model = randomized(nn.BatchNorm2d(8))
    sizes = (2, 1, 3)[: 3 - 2 * rank]
    ws_mm.update_estimates(model, make_batches(*sizes, seed=rank))
    return buffers(model[0])


def test_a_batch_norm_counts_the_batches_of_all_processes(world) -> None:
    ranks = world(2).run(batch_norm_rank)
    every = make_batches(2, 1, 3, seed=0) + make_batches(2, seed=1)
    for found in ranks:
        assert found.pop('num_batches_tracked') == 4
        assert not disagreements(found, within_batches(every), WIDE)


class SyncOnCPU(nn.SyncBatchNorm):
    """One whose forward, which only a GPU has, is left out."""

    def forward(self, input: Tensor) -> Tensor:
        return input


def sync_batch_norm_rank(rank: int) -> dict[str, Tensor]:
    model = randomized(SyncOnCPU(8))
    ws_mm.update_estimates(model, make_batches(2 + rank, 1, seed=rank))
    return buffers(model[0])


def test_a_sync_batch_norm_measures_all_processes(world) -> None:
    ranks = world(2).run(sync_batch_norm_rank)
    pairs = zip(
        *(make_batches(2 + r, 1, seed=r) for r in range(2)), strict=True
    )
    expected = within_batches([torch.cat(pair) for pair in pairs])
    for found in ranks:
        assert found.pop('num_batches_tracked') == 2
        assert not disagreements(found, expected, WIDE)


def uneven_rank(rank: int) -> dict[str, Tensor]:
    # One that waits for the other ranks, and one that does not.
    model = randomized(BCN(8, 4, mode='sync_batch'), BCN(8, 4))
    ws_mm.update_estimates(model, make_batches(*(2, 2, 1)[: 3 - 2 * rank]))
    with pytest.raises(ValueError, match='0 batches'):
        ws_mm.update_estimates(model, [] if rank else make_batches(1))
    return buffers(model[0])


def test_ranks_with_unequal_loaders_do_not_wait(world):
    found = world(2).run(uneven_rank)
    first = make_batches(2)[0]
    expected = within_batches([torch.cat([first, first])])
    assert not disagreements(found[0], expected, WIDE)


def test_the_size_of_the_next_images_stays():
    structures = pytest.importorskip('mmdet.structures')
    importlib.import_module('mmdet.models')
    resize = dict(
        type='BatchSyncRandomResize',
        random_size_range=(128, 384),
        interval=1,
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        preprocess = MODELS.build(
            dict(type='DetDataPreprocessor', batch_augments=[resize])
        )

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__(preprocess)
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), BCN(8, 4))

        def forward(self, inputs, data_samples, mode):
            self.layers(inputs.float())

    (augment,) = preprocess.batch_augments
    sample = structures.DetDataSample(metainfo=dict(img_shape=(64, 64)))
    sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4))
    batch = dict(inputs=[torch.zeros(3, 64, 64)], data_samples=[sample])
    before = augment._input_size
    MessageHub.get_current_instance().update_info('iter', 0)
    ws_mm.update_estimates(Model(), [batch])
    assert augment._input_size == before


@pytest.mark.parametrize(
    'given', [lambda x: dict(inputs=x), lambda x: (x,)], ids=['dict', 'tuple']
)
def test_a_model_of_mmengine_gets_batches_of_training(given):
    class Shift(BaseDataPreprocessor):
        def forward(self, data: Tensor, training: bool = False) -> Any:
            return given(data + 1 if training else data)

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__(Shift())
            self.norm = BCN(8, 4)

        def forward(self, inputs: Tensor, mode: str) -> None:
            assert mode == 'loss'
            self.norm(inputs)

    model, batches = Model(), make_batches(2, 1)
    ws_mm.update_estimates(model.double(), batches)
    expected = of_all_values([batch + 1 for batch in batches])
    assert not disagreements(buffers(model.norm), expected, WIDE)


@pytest.mark.parametrize('kind', ['BatchSampler', 'AspectRatioBatchSampler'])
def test_samples_are_numbered_in_the_batches_of_the_training(kind):
    if kind == 'BatchSampler':
        batches = BatchSampler
    else:
        samplers = pytest.importorskip('mmdet.datasets.samplers')
        batches = getattr(samplers, kind)

    class Sizes(list):
        def get_data_info(self, index):
            return dict(width=1 + index % 2, height=1.5)

    data = Sizes(range(8))
    sampler = batches(DefaultSampler(data, seed=0), 2, False)
    loader = DataLoader(data, batch_sampler=sampler)
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(dataloader=loader),
        seed=0,
        iter=5,
        logger=logging.getLogger('runner'),
    )
    hook = ws_mm.UpdateEstimatesHook()
    expected = [*hook._batches(runner).batch_sampler]
    ws_mm.ExactResumeHook().before_train(runner)
    found = [*hook._batches(runner).batch_sampler]
    assert found == expected
    places = sorted(index.place for batch in found for index in batch)
    assert places == [(5, number) for number in range(8)]


def test_a_sampler_of_several_sources_is_refused_before_training():
    samplers = pytest.importorskip('mmdet.datasets.samplers')
    data = ConcatDataset([[torch.zeros(1)] * 4, [torch.zeros(1)] * 4])
    sampler = samplers.MultiSourceSampler(data, 3, [1, 2], seed=0)
    loader = DataLoader(data, batch_size=3, sampler=sampler)
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(dataloader=loader), seed=0, iter=0
    )
    hook = ws_mm.UpdateEstimatesHook()
    with pytest.raises(ValueError, match='sampler is a MultiSourceSampler'):
        hook.before_train(runner)


# With mmengine's Runner.


class Stream(IterableDataset):
    """Images that come one after the other, as from a web archive."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(IMAGES)


def test_a_stream_of_images_is_refused_before_training(tmp_path):
    loader = dict(
        dataset=Stream(),
        sampler=None,
        batch_size=2,
        collate_fn=dict(type='default_collate'),
    )
    runner = Runner(
        small_run.Small(WSConv2d(3, 2, 5), BCN(2)),
        work_dir=str(tmp_path),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=False, max_iters=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[dict(type='ws_mm.UpdateEstimatesHook')],
        experiment_name='stream',
    )
    with pytest.raises(ValueError, match='data set is a Stream, a stream'):
        runner.train()


IMAGES = small_run.make_data(6)
# All images, so that their order does not matter to the first norm.
HOOK = dict(type='ws_mm.UpdateEstimatesHook', num_batches=3)
ESTIMATES = [f'body.{i}.running_{k}' for i in (1, 4) for k in ('mean', 'var')]


class Noisy(small_run.Images):
    """Images that an augmentation changes."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = super().__getitem__(index)
        noise = torch.randn_like(image['inputs'])
        return image | dict(inputs=image['inputs'] + noise)


def train(
    folder: Path,
    hooks: list[Any],
    images: small_run.Images = IMAGES,
    **options: Any,
) -> small_run.Small:
    torch.manual_seed(1)
    model = small_run.Small(
        WSConv2d(3, 8, 3, bias=False),
        BCN(8, 4, momentum=0.1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Dropout(0.2),
        nn.Conv2d(8, 2, 1),
    )
    best = dict(save_best='score', rule='less')
    options = dict(batch_size=2, val_batch_size=6) | best | options
    return small_run.train(folder, model, images, hooks, **options)


def ema(update_buffers: bool, priority: Any = 49) -> dict[str, Any]:
    return dict(
        type='EMAHook',
        momentum=0.3,
        update_buffers=update_buffers,
        priority=priority,
    )


CASES = {
    'plain': [],
    'averaged': [ema(False)],
    'averaged, buffers, too': [ema(True, 'NORMAL')],
}


def saved(folder: Path) -> list[dict[str, Any]]:
    """The checkpoints of a run, in their order."""
    files = sorted(folder.glob('[ei]*.pth'))
    return [torch.load(file, weights_only=False) for file in files]


def measured(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the first norm, over all images, with these weights."""
    images = torch.stack([each['inputs'] for each in IMAGES]).double()
    filters = reference.standardize_weight(weights['body.0.weight'])
    moments = of_all_values([nn.functional.conv2d(images, filters)])
    return {f'body.1.{name}': values for name, values in moments.items()}


def check_saved(folder: Path, validated: list[dict[str, Tensor]]) -> None:
    """A checkpoint holds the weights and estimates that were validated."""
    checkpoints = saved(folder)
    assert len(checkpoints) == len(validated) == 2
    for checkpoint, seen in zip(checkpoints, validated, strict=True):
        weights = checkpoint['state_dict']
        for name, values in weights.items():
            assert torch.equal(values, seen[name]), name
        expected = measured(weights)
        actual = {name: weights[name] for name in expected}
        assert not disagreements(actual, expected, 1e-5)
        own = checkpoint['training_estimates']
        for name in ESTIMATES:
            assert not torch.equal(own[name], weights[name])


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epoch', 'iter'])
@pytest.mark.parametrize('hooks', CASES.values(), ids=CASES)
def test_checkpoint_holds_the_validated_statistics(tmp_path, hooks, by_epoch):
    model = train(tmp_path, [*hooks, HOOK], by_epoch=by_epoch)
    check_saved(tmp_path, model.validated)
    (best,) = (torch.load(f, weights_only=False) for f in tmp_path.glob('b*'))
    assert any(
        all(torch.equal(seen[k], v) for k, v in best['state_dict'].items())
        for seen in model.validated
    )
    # The model keeps those of its own weights, which EMAHook has replaced.
    own = saved(tmp_path)[-1]['training_estimates'] if hooks else None
    for name in ESTIMATES if hooks != CASES['averaged, buffers, too'] else ():
        expected = (own or model.validated[-1])[name]
        assert torch.equal(model.state_dict()[name], expected)


def test_after_averaging_the_model_has_its_own_statistics(tmp_path):
    class Keep(Hook):
        def after_train(self, runner):
            self.runner = runner

    keep = Keep()
    model = train(tmp_path, [ema(False), HOOK, keep])
    before = copy.deepcopy(model.state_dict())
    source = saved(tmp_path)[-1]['ema_state_dict']
    for name, values in before.items():
        assert torch.equal(values, source[f'module.{name}']), name
    # EMAHook begins a new average, of the weights that trained.
    keep.runner.test()
    for name, values in model.validated[-1].items():
        assert torch.equal(values, before[name]), name


def test_names_in_a_checkpoint_are_those_of_the_model_unwrapped(tmp_path):
    model = small_run.Small(
        WSConv2d(3, 8, 3, bias=False),
        checkpoint_wrapper(BCN(8, 4, momentum=0.1)),
        nn.ReLU(),
        nn.Conv2d(8, 2, 3),
    )
    options = dict(batch_size=2, val_batch_size=6)
    small_run.train(tmp_path, model, IMAGES, [HOOK], **options)
    for checkpoint in saved(tmp_path):
        weights = checkpoint['state_dict']
        expected = measured(weights)
        actual = {name: weights[name] for name in expected}
        assert not disagreements(actual, expected, 1e-5)
        assert checkpoint['training_estimates'].keys() == expected.keys()
        assert not any('wrapped' in name for name in weights)


def test_after_training_the_hook_leaves_the_model_alone(tmp_path):
    class Keep(Hook):
        def after_train(self, runner):
            self.runner = runner

    keep = Keep()
    model = train(tmp_path, [HOOK, keep])
    with torch.no_grad():
        model.body[1].running_mean.fill_(7)  # as another checkpoint would
    before = copy.deepcopy(model.state_dict())
    keep.runner.val()
    keep.runner.save_checkpoint(str(tmp_path), 'own.pth')
    own = torch.load(tmp_path / 'own.pth', weights_only=False)
    assert 'training_estimates' not in own
    for found in (model.validated[-1], own['state_dict'], model.state_dict()):
        for name, values in before.items():
            assert torch.equal(found[name], values), name


@pytest.mark.parametrize('by_epoch', [True, False])
def test_a_validation_and_a_checkpoint_share_one_pass(
    tmp_path, monkeypatch, by_epoch
):
    module = importlib.import_module('ws_mm.estimates_hook')
    passes = []

    def counted(*args, **kwargs):
        passes.append(1)
        return ws_mm.estimates.measure(*args, **kwargs)

    monkeypatch.setattr(module, 'measure', counted)
    model = train(tmp_path, [HOOK], by_epoch=by_epoch)
    assert len(model.validated) == len(saved(tmp_path)) == len(passes) == 2


def test_measured_statistics_do_not_depend_on_the_workers(tmp_path):
    found = []
    for workers in (0, 1, 2):
        folder = tmp_path / str(workers)
        model = train(
            folder,
            [HOOK, dict(type='ws_mm.ExactResumeHook')],
            images=Noisy(IMAGES),
            workers=workers,
            # Some versions of mmengine start the workers of a loop of
            # iterations before the hook runs.
            by_epoch=True,
        )
        found.append(model.validated)
    for validated in found[1:]:
        for one, other in zip(found[0], validated, strict=True):
            for name, values in one.items():
                assert torch.equal(values, other[name]), name


@pytest.mark.parametrize(
    ('case', 'workers'), [*((case, 0) for case in CASES), ('plain', 1)]
)
def test_training_is_unchanged(tmp_path, case, workers):
    hooks = CASES[case]
    found = []
    for name, more in (('with', [HOOK]), ('without', [])):
        folder = tmp_path / name
        model = train(folder, [*hooks, *more], workers=workers)
        found.append((model.trained, dict(model.named_parameters())))
        own = saved(folder)[-1]
        kept = own.get('training_estimates', own['state_dict'])
        found[-1] += ({k: kept[k] for k in ESTIMATES},)
        source = own.get('ema_state_dict', {})
        found[-1] += ({k: v for k, v in source.items() if 'step' not in k},)
    assert len(found[0][0]) == 4
    assert found[0][0] == found[1][0]  # the same images in the same order
    for actual, expected in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize('hooks', CASES.values(), ids=CASES)
def test_resumed_training_equals_an_uninterrupted_one(tmp_path, hooks):
    hooks = [*hooks, HOOK, dict(type='ws_mm.ExactResumeHook')]
    train(tmp_path / 'whole', hooks)
    train(tmp_path / 'halves', hooks, steps=2)
    train(tmp_path / 'halves', hooks, resume=True)
    whole, halves = (
        saved(tmp_path / name)[-1] for name in ('whole', 'halves')
    )
    for key in ('state_dict', 'ema_state_dict', 'training_estimates'):
        for name, values in whole.get(key, {}).items():
            assert torch.equal(values, halves[key][name]), (key, name)


def train_rank(
    rank: int, folder: Path, hooks: list[Any], own_seeds: bool
) -> Any:
    randomness = dict(seed=3, diff_rank_seed=own_seeds)
    model = train(folder, hooks, ranks=True, randomness=randomness)
    return model.validated


@pytest.mark.parametrize('own_seeds', [False, True])
def test_hook_in_several_processes(tmp_path, world, own_seeds):
    hooks = [ema(False), dict(type='ws_mm.SyncEstimatesHook'), HOOK]
    ranks = world(2).run(train_rank, tmp_path, hooks, own_seeds)
    for first, second in zip(*ranks, strict=True):
        for name in ESTIMATES:
            assert torch.equal(first[name], second[name])
    check_saved(tmp_path, ranks[0])


def test_hook_rejects_wrong_arguments():
    for wrong in (0, 2.5, '200'):
        with pytest.raises(ValueError, match='num_batches=.*at least 1'):
            ws_mm.UpdateEstimatesHook(wrong)


def test_no_batch_to_measure_on_is_said_before_the_first_step(tmp_path):
    loader = dict(batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match=r'7 images .*of 8 and\s+drop_last'):
        train(tmp_path, [HOOK], small_run.make_data(7), **loader)
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize('on_ema', [True, False])
def test_validation_of_other_weights_than_measured_is_refused(
    tmp_path, on_ema
):
    kinds = pytest.importorskip('mmpretrain.engine.hooks')
    average = kinds.EMAHook(evaluate_on_ema=on_ema, evaluate_on_origin=True)
    with pytest.raises(ValueError, match='evaluate_on_origin=False'):
        train(tmp_path, [average, HOOK])


def test_a_norm_of_two_names_is_saved_under_both(tmp_path):
    norm = BCN(8, 4, momentum=0.1)
    model = small_run.Small(
        WSConv2d(3, 8, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(8, 2, 3)
    )
    model.alias = norm
    small_run.train(tmp_path, model, IMAGES, [ema(False), HOOK], batch_size=2)
    for checkpoint in saved(tmp_path):
        own = checkpoint['training_estimates']
        trained = checkpoint['ema_state_dict']
        weights = checkpoint['state_dict']
        for name, values in measured(weights).items():
            other = name.replace('body.1', 'alias')
            assert not disagreements(
                {name: weights[other]}, {name: values}, 1e-5
            )
            assert torch.equal(own[other], own[name])
            for each in (name, other):
                assert torch.equal(trained[f'module.{each}'], own[name])


@pytest.mark.parametrize('host', ['mmdet', 'mmseg'])
def test_models_and_loaders_of_the_hosts(tmp_path, host):
    pytest.importorskip(f'{host}.models', exc_type=ImportError)
    text = tiny_runs.DET if host == 'mmdet' else tiny_runs.SEG
    folder = tiny_runs.write_data(tmp_path)
    cfg = Config.fromfile(tiny_runs.write_config(folder, text))
    with DefaultScope.overwrite_default_scope(host):
        model = MODELS.build(cfg.model)
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    first, seen = next(m for m in model.modules() if isinstance(m, BCN)), []
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    before = {k: v.clone() for k, v in model.named_buffers()}
    ws_mm.update_estimates(model, loader, num_batches=2)
    assert len(seen) == 2
    expected = of_all_values([x.double() for x in seen])
    assert not disagreements(buffers(first), expected, 1e-5)
    for name, values in model.named_buffers():
        if 'running' in name:
            assert values.isfinite().all()
            assert not torch.equal(values, before[name]), name


def test_only_a_resume_takes_the_estimates_of_training(tmp_path):
    model = train(tmp_path, [HOOK])
    last = saved(tmp_path)[-1]
    hook = HOOKS.build(HOOK)
    for resume in (False, True):
        content = copy.deepcopy(last)
        runner = SimpleNamespace(model=model, hooks=[hook], _resume=resume)
        hook.after_load_checkpoint(runner, content)
        holds = last['training_estimates'] if resume else last['state_dict']
        for name in ESTIMATES:
            assert torch.equal(content['state_dict'][name], holds[name])


def rank_without_a_best(rank: int, folder: Path, options: Any) -> None:
    hooks = [dict(type='ws_mm.SyncEstimatesHook'), HOOK]
    train(folder, hooks, ranks=True, save_best=None, rule=None, **options)


@pytest.mark.parametrize(
    'options',
    [
        {},
        # The last checkpoint comes between two intervals.
        dict(interval=3),
        dict(interval=3, by_epoch=True),
        # The first one comes before the first interval.
        dict(interval=2, save_begin=1, save_last=False),
        dict(interval=2, save_begin=1, save_last=False, by_epoch=True),
    ],
)
def test_each_checkpoint_of_ranks_is_measured(tmp_path, world, options):
    world(2).run(rank_without_a_best, tmp_path, options)
    found = saved(tmp_path)
    assert found
    for checkpoint in found:
        assert 'training_estimates' in checkpoint
        expected = measured(checkpoint['state_dict'])
        actual = {k: checkpoint['state_dict'][k] for k in expected}
        assert not disagreements(actual, expected, 1e-5)


class SaveAlone(Hook):
    """Save at a time that no CheckpointHook has."""

    def after_train_iter(self, runner, batch_idx, **_):
        if runner.iter == 0:
            runner.save_checkpoint(runner.work_dir, 'alone.pth')


def saving_rank(rank: int, folder: Path) -> None:
    hooks = [dict(type='ws_mm.SyncEstimatesHook'), HOOK, SaveAlone()]
    train(folder, hooks, ranks=True, save_best=None, rule=None)


def test_a_rank_that_saves_alone_does_not_wait_and_says_so(tmp_path, world):
    world(2).run(saving_rank, tmp_path)
    alone = torch.load(tmp_path / 'alone.pth', weights_only=False)
    assert 'training_estimates' not in alone
    logs = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert logs.count('saved by rank 0 at a time of its own') == 1


def test_a_measurement_draws_images_as_the_training_does():
    data = DataLoader(small_run.make_data(6), 2, worker_init_fn=print)
    orders = []
    for iteration in (0, 0, 1, 2, 3):
        loop = SimpleNamespace(dataloader=data)
        runner = SimpleNamespace(train_loop=loop, seed=0, iter=iteration)
        batches = ws_mm.UpdateEstimatesHook(1)._batches(runner)
        assert batches.worker_init_fn is print
        orders.append(str([*batches.batch_sampler]))
    assert orders[0] == orders[1]
    assert len(set(orders)) > 2


@pytest.mark.parametrize('drop', [False, True])
def test_a_measurement_drops_the_batch_that_the_training_drops(drop):
    data = DataLoader(small_run.make_data(5), 2, drop_last=drop)
    loop = SimpleNamespace(dataloader=data)
    runner = SimpleNamespace(train_loop=loop, seed=0, iter=0)
    batches = ws_mm.UpdateEstimatesHook()._batches(runner)
    sizes = [len(batch['inputs']) for batch in batches]
    assert sizes == [2, 2] + [1] * (not drop)
