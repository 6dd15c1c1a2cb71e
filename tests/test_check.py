"""Findings of check in models, and CheckModelHook."""

import re
from contextlib import suppress
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import HOOKS
from small_nets import IMAGE, Net, Run, image, layers, randomize
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

import ws_mm
from ws_mm import BCN, WSConv2d, check
from ws_mm.hooks import batch_norm_problems, frozen_problems
from ws_mm.running_statistics import RunningStatistics


def norms_of(report):
    return {conv.name: (conv.norms, conv.how) for conv in report}


def test_execution_is_believed_over_names():
    report = check(Net(), image())
    assert norms_of(report) == {
        'conv1': (('bn2',), 'proven'),
        'conv2': (('bn1',), 'proven'),
        'logits': ((), 'proven'),
        'auxiliary': ((), 'guessed'),
    }
    assert [conv.standardized for conv in report] == [True, True, False, False]
    assert not report.mistakes
    assert 'bn2 (BCN)' in str(report).splitlines()[1]
    assert '-; goes to the output of the model' in str(report)


def test_names_are_believed_without_inputs():
    assert norms_of(check(Net()))['conv1'] == (('bn1',), 'guessed')


def test_guess_wants_fitting_channels_and_order():
    first, second = nn.Sequential(), nn.Sequential()
    first.conv, first.norm = WSConv2d(3, 8, 1), nn.GroupNorm(2, 6)
    second.norm, second.conv = nn.GroupNorm(2, 8), WSConv2d(8, 8, 1)
    third = nn.Sequential(WSConv2d(8, 8, 1), nn.Sequential(nn.ReLU()))
    third.append(nn.BatchNorm2d(8))
    fourth = nn.Sequential(WSConv2d(8, 8, 1), nn.ReLU(), nn.BatchNorm2d(8))
    fifth = nn.Sequential(WSConv2d(8, 8, 1), nn.BatchNorm2d(8))
    fifth.order = ('norm', 'act', 'conv')
    sixth = nn.Sequential(
        WSConv2d(8, 8, 1), WSConv2d(8, 8, 1), nn.LayerNorm([8, 3, 3])
    )
    seventh = nn.ModuleDict(dict(bn11=BCN(8, 4), conv1=WSConv2d(8, 8, 1)))
    report = check(
        nn.Sequential(first, second, third, fourth, fifth, sixth, seventh)
    )
    assert [len(conv.norms) for conv in report] == [0, 0, 0, 1, 0, 0, 1, 0]
    assert len(report.mistakes) == 6
    (alone,) = check(WSConv2d(3, 8, 1))
    assert not alone.norms


@pytest.mark.parametrize('kind', ['runs', 'fails'])
def test_check_leaves_the_model_as_it_was(kind):
    model = randomize(Net()).train()
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ran = []

    def fails(m):
        y = m(image())
        ran.append((m.training, y.requires_grad))
        raise RuntimeError('no such input')

    if kind == 'fails':
        with pytest.raises(RuntimeError, match='no such input'):
            check(model, fails)
        assert ran == [(False, False)]
    else:
        check(model, MappingProxyType({'x': image()}))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert not model.bn1.training
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class Minimal(RunningStatistics):
    """A norm of a user, which is none of torch's."""

    statistics = {'running_mean': 0.0}  # noqa: RUF012

    def __init__(self, channels):
        super().__init__()
        self.register_statistics(channels)

    def forward(self, x):
        return x - self.running_mean.view(1, -1, 1, 1)


@pytest.mark.parametrize(
    'norm',
    [
        nn.BatchNorm2d(8),
        nn.InstanceNorm2d(8),
        nn.LayerNorm([8, 12, 12]),
        ws_mm.zoo.FRN(8),
        Minimal(8),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_of_any_kind_are_known(norm):
    model = nn.Sequential(WSConv2d(3, 8, 1), nn.Sequential(norm))
    (report,) = check(model, image())
    assert report.norms == ('1.0',)
    assert not report.mistake


def test_a_norm_that_reads_twice_is_listed_with_both_ways():
    def run(m, x):
        y = m.conv(x)
        twice = m.bn(F.max_pool2d(F.relu(y), 2)), m.bn(y)
        return *twice, m.other(F.relu(y))

    (report,) = check(Run(run, **layers(other=BCN(8, 4))), image())
    assert report.norms == ('bn', 'other')
    assert report.via == ('relu', 'max_pool2d_with_indices')


def test_indices_of_a_pooling_are_no_output_of_the_convolution():
    def run(m, x):
        y, indices = F.max_pool2d(m.conv(x), 2, return_indices=True)
        return m.bn(y), indices

    assert not check(Run(run, **layers()), image()).mistakes


def test_buffers_that_a_model_replaces_are_put_back():
    def run(m, x):
        m.count = m.count + 1
        m.first = x
        return m.bn(m.conv(x))

    model = Run(run, **layers())
    model.register_buffer('count', torch.zeros(1))
    model.register_buffer('first', None)
    count = model.count
    check(model, image())
    assert model.count is count
    assert count == 0
    assert model.first is None


def test_scale_keeping_operations_are_seen_through():
    def run(m, x):
        y = F.relu(m.conv(x), inplace=True)
        return m.bn(F.max_pool2d(F.interpolate(y, scale_factor=2), 2) + y)

    (report,) = check(Run(run, **layers()), image())
    assert report.norms == ('bn',)
    assert report.via == (
        'relu',
        'upsample_nearest2d',
        'max_pool2d_with_indices',
        'add',
    )
    assert not report.mistake


OPERATIONS = {
    1: [
        nn.AvgPool1d(2),
        nn.MaxPool1d(2),
        nn.AdaptiveAvgPool1d(2),
        nn.AdaptiveMaxPool1d(2),
        nn.Upsample(scale_factor=2, mode='linear'),
    ],
    2: [
        nn.AvgPool2d(2),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveMaxPool2d(2),
        nn.Upsample(scale_factor=2, mode='bilinear'),
        nn.Upsample(scale_factor=2, mode='bicubic'),
    ],
    3: [
        nn.AvgPool3d(2),
        nn.MaxPool3d(2),
        nn.AdaptiveAvgPool3d(2),
        nn.AdaptiveMaxPool3d(2),
        nn.Upsample(scale_factor=2, mode='trilinear'),
    ],
}
for dims, operations in OPERATIONS.items():
    operations += [
        nn.PReLU(),
        nn.LeakyReLU(),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode='nearest-exact'),
        *(
            getattr(nn, f'{kind}Pad{dims}d')(1)
            for kind in ('Reflection', 'Replication', 'Zero')
            if hasattr(nn, f'{kind}Pad{dims}d')
        ),
    ]


@pytest.mark.parametrize(
    ('dims', 'operation'),
    [(dims, each) for dims in OPERATIONS for each in OPERATIONS[dims]],
    ids=str,
)
def test_pooling_resizing_and_padding_keep_the_scale(dims, operation):
    conv = getattr(ws_mm, f'WSConv{dims}d')(3, 8, 1)
    x = torch.randn(2, 3, *[6] * dims)
    (report,) = check(nn.Sequential(conv, operation, BCN(8, 4)), x)
    assert report.norms == ('2',)
    assert not report.mistake
    # It does: half the filters, half the output.
    y = torch.randn(2, 8, *[6] * dims)
    torch.testing.assert_close(operation(y / 2), operation(y) / 2)


@pytest.mark.parametrize(
    'rearrange',
    [
        lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
        lambda y: torch.cat(y.split((2, 6), 1)[::-1], 1),
        lambda y: torch.stack(y.unbind(1)[::-1], 1),
        lambda y: F.pixel_shuffle(y, 2).repeat_interleave(4, 1),
        lambda y: F.pixel_unshuffle(y, 2)[:, :8],
        lambda y: y.double().float(),
        nn.Sequential(nn.Sequential(nn.ReLU())),
    ],
)
def test_what_moves_values_keeps_the_scale(rearrange):
    model = Run(lambda m, x: m.bn(rearrange(m.conv(x))), **layers())
    (report,) = check(model, image())
    assert report.norms == ('bn',)
    assert not report.mistake


@pytest.mark.parametrize(
    ('run', 'found'),
    [
        (lambda m, x: m.conv(x), 'no normalization.*output of the model'),
        (lambda m, x: m.bn(m.conv(x).sigmoid()), 'sigmoid'),
        (
            lambda m, x: [m.bn(y := m.conv(x)), y],
            'not everywhere.*output of the model',
        ),
        (lambda m, x: m.bn(y := m.conv(x)) * y, 'not everywhere.*mul'),
        (lambda m, x: F.relu(m.conv(x), True).exp_(), 'exp_'),
        (
            lambda m, x: m.logits(m.conv(x)),
            r'no normalization.*convolution in logits',
        ),
    ],
)
def test_unnormalized_ws_conv_is_a_mistake(run, found):
    model = Run(run, **layers(logits=nn.Conv2d(8, 2, 1)))
    (mistake,) = check(model, image()).mistakes
    assert re.search(found, mistake)
    assert 'make it a plain convolution' in mistake


def test_hook_stops_before_training():
    bad = SimpleNamespace(model=nn.Sequential(WSConv2d(3, 8, 1), nn.ReLU()))
    good = SimpleNamespace(model=Net())
    hook = HOOKS.build(dict(type='ws_mm.CheckModelHook'))
    hook.before_train(good)
    with pytest.raises(ValueError, match='0 .WSConv2d.*conv_cfg=None'):
        hook.before_train(bad)
    HOOKS.build(dict(type='CheckModelHook', on_mistake='print')).before_train(
        bad
    )
    with pytest.raises(ValueError, match="on_mistake='x'"):
        HOOKS.build(dict(type='CheckModelHook', on_mistake='x'))


@pytest.mark.parametrize('grouped', [False, True])
def test_hook_counts_the_images_of_a_step(grouped, monkeypatch):
    samplers = pytest.importorskip('mmdet.datasets.samplers')
    said = []
    monkeypatch.setattr(
        'ws_mm.hooks._warn_once', lambda text: said.append(text)
    )
    data = [torch.zeros(1)] * 4
    options = dict(batch_size=2)
    if grouped:  # mmdet's default
        sampler = SequentialSampler(data)
        batches = samplers.AspectRatioBatchSampler(sampler, 2)
        options = dict(batch_sampler=batches)
    runner = SimpleNamespace(
        model=nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
        train_dataloader=DataLoader(data, **options),
    )
    HOOKS.build(dict(type='CheckModelHook')).before_train_iter(runner, 0)
    (line,) = said
    few = 'The model trains 1 batch norm (1) on the statistics of 2 images.'
    assert few in line


def test_batches_of_a_sampler_without_a_size_are_not_counted(said):
    data = [torch.zeros(1)] * 4
    runner = SimpleNamespace(
        model=nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
        train_dataloader=DataLoader(data, batch_sampler=[[0, 1, 2], [3]]),
    )
    HOOKS.build(dict(type='CheckModelHook')).before_train_iter(runner, 0)
    assert not said


@pytest.mark.parametrize(
    ('images', 'processes', 'expected'),
    [
        (0, 4, ''),  # unknown
        (1, 1, 'trains 2 batch norms (1, 2) on the statistics of 1 image.'),
        (1, 4, 'trains 1 batch norm (1) on the statistics of 1 image.'),
        (2, 1, 'trains 2 batch norms (1, 2) on the statistics of 2 images.'),
        (2, 2, 'trains 1 batch norm (1) on the statistics of 2 images.'),
        (3, 1, ''),
    ],
)
def test_batch_norms_count_the_images_that_they_see(
    images, processes, expected
):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.SyncBatchNorm(8),
        nn.BatchNorm2d(8).eval(),  # norm_eval
    )
    for each in (model, nn.DataParallel(model)):
        problems = ''.join(batch_norm_problems(each, images, processes))
        assert expected in problems
        assert bool(problems) == bool(expected)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Lines that the hooks log."""
    lines = []
    monkeypatch.setattr(
        'ws_mm.hooks.print_log', lambda text, **_: lines.append(text)
    )
    return lines


def test_maps_of_one_size_are_no_levels(said):
    head = nn.ModuleDict(dict(roi_head=nn.Sequential(BCN(8), BCN(8))))
    hook = HOOKS.build(dict(type='ws_mm.CheckModelHook'))
    runner = SimpleNamespace(model=head, cfg={})
    hook.before_train(runner)
    for regions in (3, 0, 1):
        head['roi_head'](torch.randn(regions, 8, 7, 7))
    hook.after_train_iter(runner, 0)
    assert not said


def test_hook_prints_mistakes_that_do_not_stop_it(said):
    bad = SimpleNamespace(model=nn.Sequential(WSConv2d(3, 8, 1), nn.ReLU()))
    hook = HOOKS.build(dict(type='CheckModelHook', on_mistake='print'))
    hook.before_train(bad)
    (text,) = said
    assert '0 (WSConv2d' in text
    assert 'on_mistake' not in text


def test_names_of_a_wrapped_model_are_those_of_its_config(said):
    head = nn.ModuleDict(dict(bbox_head=nn.Sequential(BCN(8))))
    runner = SimpleNamespace(model=nn.DataParallel(head), cfg={})
    hook = HOOKS.build(dict(type='ws_mm.CheckModelHook'))
    hook.before_train(runner)
    for size in (8, 4):
        head['bbox_head'](torch.randn(1, 8, size, size))
    hook.after_train_iter(runner, 0)
    (line,) = said
    assert line.startswith('1 BCN layer (bbox_head.0) ran')
    assert 'set model.bbox_head.norm_cfg=' in line
    bad = nn.ModuleDict(dict(neck=WSConv2d(3, 8, 1)))
    with pytest.raises(ValueError, match=r'\nneck .WSConv2d'):
        hook.before_train(SimpleNamespace(model=nn.DataParallel(bad)))


def test_hook_names_what_levels_share(said):
    head = nn.ModuleDict(dict(bbox_head=nn.Sequential(BCN(8), BCN(8))))
    runner = SimpleNamespace(model=head, cfg={})
    levels = [torch.randn(1, 8, size, size) for size in (8, 4, 2)]
    hook = HOOKS.build(dict(type='ws_mm.CheckModelHook'))
    for compiled, sizes, count in ((True, 3, 0), (False, 1, 0), (False, 3, 1)):
        runner.cfg = dict(compile=compiled)
        hook.before_train(runner)
        for x in levels[:sizes]:
            head['bbox_head'](x)
            head['bbox_head'](x)
        for iteration in range(2):
            hook.after_train_iter(runner, iteration)
        assert len(said) == count
        # It looks once and leaves nothing behind.
        assert not head['bbox_head'][0]._forward_pre_hooks
    # Nor are images that another hook measures as the training begins.
    hook.before_train(runner)
    head['bbox_head'](levels[1])
    hook.before_train_iter(runner, 0)
    head['bbox_head'](levels[0])
    hook.after_train_iter(runner, 0)
    assert len(said) == 1
    # Images of two sizes are no levels.
    runner.model = nn.ModuleDict(dict(student=head))
    hook.before_train(runner)
    assert not head['bbox_head'][0]._forward_pre_hooks
    layers = '2 BCN layers (bbox_head.0, bbox_head.1)'
    assert said[0].startswith(f'{layers} ran on maps of several sizes')
    assert 'model.bbox_head.norm_cfg=dict(' in said[0]


def test_levels_are_seen_where_a_norm_takes_its_input_by_keyword(said):
    head = nn.ModuleDict(dict(bbox_head=nn.Sequential(BCN(8))))
    hook = HOOKS.build(dict(type='ws_mm.CheckModelHook'))
    runner = SimpleNamespace(model=head, cfg={})
    hook.before_train(runner)
    for size in (8, 4):
        head['bbox_head'][0](input=torch.randn(1, 8, size, size))
    hook.after_train_iter(runner, 0)
    (line,) = said
    assert line.startswith('1 BCN layer (bbox_head.0) ran on maps of several')


def in_a_data_sample(y, z):
    elements = pytest.importorskip('mmengine.structures')
    sample = elements.BaseDataElement(metainfo=dict(shape=z.shape), logits=z)
    sample.features = elements.PixelData(data=y[0])
    return [sample]


def in_an_object(y, z):
    return SimpleNamespace(features=y, logits=z)


@pytest.mark.parametrize('returned', [in_an_object, in_a_data_sample])
def test_objects_that_a_model_returns_are_opened(returned):
    def run(m, x):
        y = m.conv(x)
        return returned(y, m.bn(y))

    (mistake,) = check(Run(run, **layers()), image()).mistakes
    assert 'not everywhere: its output goes to the output of the' in mistake


@pytest.mark.parametrize('fails', ['layer', 'hook'])
def test_a_model_may_try_what_fails(fails):
    def run(m, x):
        for channels in (2, 3):
            with suppress(RuntimeError):
                y = m.other(x[:, :channels])
        return m.conv(y).sigmoid()

    def refuse(module, args):
        if args[0].shape[1] == 2:
            raise RuntimeError('two channels')

    model = Run(run, **layers(other=nn.BatchNorm2d(3)))
    if fails == 'hook':
        model.other.register_forward_pre_hook(refuse)
    (mistake,) = check(nn.Sequential(model), image()).mistakes
    assert 'has no normalization after it (proven)' in mistake
    assert 'sigmoid in 0' in mistake


def test_a_scripted_layer_is_seen_through():
    layers = WSConv2d(3, 8, 1), torch.jit.script(nn.ReLU()), BCN(8, 4)
    (report,) = check(nn.Sequential(*layers), image())
    assert report.norms == ('2',)
    assert report.via == ('relu',)


class Compiled(nn.Module):
    """An operator of a library, which the dispatcher does not see."""

    def forward(self, x):
        assert x.data_ptr()
        return torch.ones(IMAGE[0], 8, *IMAGE[2:])


@pytest.mark.parametrize('first', ['norm', 'own', 'keyword'])
def test_an_operator_that_no_dispatcher_sees_reads_what_it_is_given(first):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = WSConv2d(3, 8, 1), BCN(8, 4)
            self.own = Compiled()

        def forward(self, x):
            x = self.conv(x)
            if first == 'norm':
                return self.norm(x) + self.own(x)
            if first == 'keyword':
                return self.norm(x) + self.own(x=x)
            return self.own(x) + self.norm(x)

    (mistake,) = check(Two(), image()).mistakes
    assert 'own' in mistake


def test_what_returns_its_input_reads_nothing():
    model = nn.Sequential(
        WSConv2d(3, 8, 1), nn.Identity(), nn.Dropout(), BCN(8, 4)
    )
    assert not check(model, image()).mistakes


def test_a_norm_of_other_channels_is_not_that_of_a_name():
    layers = dict(conv1=WSConv2d(3, 8, 1), bn1=nn.BatchNorm2d(6))
    assert check(nn.ModuleDict(layers))[0].norms == ()


@pytest.mark.parametrize('affine', [False, True])
def test_frozen_group_norms_that_need_no_warning(affine):
    norm = nn.GroupNorm(2, 8, affine=affine).requires_grad_(False)
    if affine:
        nn.init.uniform_(norm.bias, 0.1, 1)  # a checkpoint's
    assert frozen_problems(nn.Sequential(WSConv2d(3, 8, 1), norm)) == []
