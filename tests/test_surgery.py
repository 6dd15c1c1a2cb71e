"""What is found in models, and whether rebuilt ones compute the same."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from comparison import relative_error
from mmengine.registry import HOOKS
from torch import nn

from ws_mm import BCN, WSConv2d, bake, check, convert

IMAGE = (2, 3, 12, 12)


class Net(nn.Module):
    """Misleading on purpose: bn1 and bn2 are run in the other order."""

    def __init__(self, conv=WSConv2d, norm=lambda c: BCN(c, 4)):
        super().__init__()
        self.conv1 = conv(3, 8, 3, bias=True, padding=1)
        self.bn1 = norm(8)
        self.conv2 = conv(8, 8, 3, groups=2, padding_mode='reflect', padding=1)
        self.bn2 = norm(8)
        self.logits = nn.Conv2d(8, 2, 1)
        self.auxiliary = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.bn2(self.conv1(x)))
        return self.logits(F.relu(self.bn1(self.conv2(x))))


class Run(nn.Module):
    """Any layers, run by any function of them and the image."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.run(self, x)


def randomize(model):
    for name, values in model.state_dict().items():
        if values.is_floating_point():
            values.copy_(torch.randn(values.shape))
            if name.endswith('running_var'):
                values.copy_(torch.rand(values.shape) + 0.2)
    return model


def image(dtype=torch.float32):
    return torch.randn(IMAGE, dtype=dtype)


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
    report = check(nn.Sequential(first, second, third, fourth, fifth))
    assert [len(conv.norms) for conv in report] == [0, 0, 0, 1, 0]
    assert len(report.mistakes) == 4


def test_check_leaves_the_model_as_it_was():
    model = randomize(Net()).train()
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check(model, {'x': image()})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert not model.bn1.training
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def layers(**more):
    return dict(conv=WSConv2d(3, 8, 1), bn=BCN(8, 4), **more)


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
    assert 'conv_cfg=None' in mistake


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.half])
@pytest.mark.parametrize('eps_mode', ['outside', 'inside'])
def test_baked_weight_is_bit_identical(dtype, eps_mode, monkeypatch):
    conv = randomize(WSConv2d(4, 6, 3, eps=0.1, eps_mode=eps_mode)).to(dtype)
    seen = {}
    monkeypatch.setattr(
        nn.Conv2d,
        '_conv_forward',
        lambda self, x, weight, bias: seen.setdefault('weight', weight),
    )
    conv(torch.ones(1, 4, 3, 3, dtype=dtype))
    baked = bake(conv)
    assert type(baked) is nn.Conv2d
    assert torch.equal(baked.weight, seen['weight'])
    assert isinstance(conv, WSConv2d)
    assert not torch.equal(conv.weight, baked.weight)


@pytest.mark.parametrize('fold', [False, True])
@pytest.mark.parametrize('outer_affine', ['group', 'channel'])
@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float32, 2e-6), (torch.float64, 1e-12)]
)
def test_baked_model_computes_the_same(fold, outer_affine, dtype, tolerance):
    net = Net(norm=lambda c: BCN(c, 4, outer_affine=outer_affine, eps=0.1))
    net = randomize(net).to(dtype).eval()
    baked = bake(net, image(dtype), fold_estimates=fold)
    assert type(baked.conv1) is nn.Conv2d
    assert type(baked.bn1) is (nn.GroupNorm if fold else BCN)
    x = image(dtype)
    # Sharing parameters with the copy would make them equal in any case.
    expected = net(x)
    randomize(net)
    assert relative_error(baked(x), expected) <= tolerance
    keys, own = set(baked.state_dict()), set(net.state_dict())
    assert keys - own == ({'conv2.bias'} - own if fold else set())
    assert all('running' in k or '.bn_' in k for k in own - keys)
    host = Net(nn.Conv2d, lambda c: nn.GroupNorm(4, c, 0.1)).to(dtype).eval()
    host.conv1.bias.data.zero_()
    if fold:
        host.load_state_dict(baked.state_dict())
        assert relative_error(host(x), expected) <= tolerance


@pytest.mark.parametrize('fold', [False, True])
def test_filters_that_layers_share_are_baked_for_each(fold):
    def run(m, x):
        ws = m.bn(m.conv(x)) + m.other(m.twin(x))
        return ws + m.third(m.raw(x)) + m.plain(x)

    more = dict(twin=WSConv2d(3, 8, 1), other=BCN(8, 4))
    more |= dict(raw=nn.Conv2d(3, 8, 1), third=BCN(8, 4))
    model = randomize(Run(run, **layers(plain=nn.Conv2d(3, 8, 1), **more)))
    for twin in (model.twin, model.raw, model.plain):
        twin.weight = model.conv.weight
    x = image()
    baked = bake(model.eval(), x, fold_estimates=fold)
    assert relative_error(baked(x), model(x)) <= 2e-6


def test_fold_without_affines():
    net = Net(norm=lambda c: BCN(c, 4, affine=False)).double()
    randomize(net).eval()
    x = image(torch.float64)
    baked = bake(net, x, fold_estimates=True)
    assert relative_error(baked(x), net(x)) <= 1e-12


def twice(m, x):
    return m.bn(m.conv(x)), m.bn(m.conv(2 * x))


def test_a_pair_run_twice_is_folded():
    model = randomize(Run(twice, **layers()))
    model.alias = model.conv
    x = image()
    baked = bake(model.eval(), x, fold_estimates=True)
    assert baked.alias is baked.conv
    for actual, expected in zip(baked(x), model(x), strict=True):
        assert relative_error(actual, expected) <= 2e-6


@pytest.mark.parametrize(
    ('run', 'why'),
    [
        (
            lambda m, x: m.bn(y := m.conv(x)) + m.other(y),
            'conv feeds bn and other',
        ),
        (
            lambda m, x: m.other(m.conv(x)) + m.bn(m.bn(m.plain(x))),
            'bn does not follow',
        ),
        (
            lambda m, x: m.bn(m.conv(x)) + m.bn(m.plain(x)),
            'bn is shared by conv and plain',
        ),
        (
            lambda m, x: m.bn(y := m.conv(x)) + y.exp(),
            'conv feeds bn and exp in the model itself',
        ),
        (lambda m, x: m.bn(m.conv(x)), 'other is not reached'),
        (
            lambda m, x: m.bn(F.relu(m.conv(x), True)),
            'bn does not follow',
        ),
    ],
)
def test_fold_refuses_what_it_cannot_prove(run, why):
    model = Run(run, **layers(other=BCN(8, 4), plain=nn.Conv2d(3, 8, 1)))
    with pytest.raises(ValueError, match=why):
        bake(model, image(), fold_estimates=True)
    with pytest.raises(ValueError, match='inputs='):
        bake(model, fold_estimates=True)


class ConvWS2d(nn.Conv2d):
    """Named as mmcv's."""


def test_foreign_ws_is_seen_and_not_baked():
    model = nn.Sequential(ConvWS2d(3, 8, 1))
    assert 'ConvWS2d' in check(model).mistakes[0]
    with pytest.raises(ValueError, match="0: only.*type='ws_mm.WSConv2d'"):
        bake(model)


def test_convert_replaces_proven_pairs_only():
    source = Net(nn.Conv2d, nn.BatchNorm2d)
    del source.auxiliary
    randomize(source).eval()
    new = convert(source, dict(eps_mode='inside'), {}, inputs=image())
    kinds = {name: type(module) for name, module in new.named_children()}
    assert kinds == {
        'conv1': WSConv2d,
        'bn1': BCN,
        'conv2': WSConv2d,
        'bn2': BCN,
        'logits': nn.Conv2d,
    }
    assert new.conv1.eps_mode == 'inside'
    assert type(source.conv1) is nn.Conv2d
    assert type(source.bn1) is nn.BatchNorm2d
    assert not check(new, image()).mistakes
    y = torch.randn(2, 8, 5, 5)
    inner = F.batch_norm(
        y, new.bn1.running_mean, new.bn1.running_var,
        new.bn1.bn_weight, new.bn1.bn_bias,
    )  # fmt: skip
    torch.testing.assert_close(inner, source.bn1(y), rtol=0, atol=0)
    assert torch.equal(new.bn1.weight, torch.ones(8))


def test_convert_gn_to_bcn_is_exact():
    source = Net(nn.Conv2d, lambda c: nn.GroupNorm(4, c)).double()
    del source.auxiliary
    randomize(source)
    x = image(torch.float64)
    new = convert(source, norm=dict(outer_affine='channel'), inputs=x)
    assert type(new.conv1) is nn.Conv2d
    assert type(new.bn1) is BCN
    new.eval()
    # The estimates' variance is 1, to which BCN adds its eps.
    assert relative_error(new(x), source(x)) <= 1e-4
    with pytest.raises(ValueError, match="outer_affine='channel'"):
        convert(source, norm={}, inputs=x)
    with pytest.raises(ValueError, match='bn2: .*4 groups, BCN 2'):
        convert(source, norm=dict(num_groups=2), inputs=x)


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Renamed(nn.GroupNorm):
    def forward(self, x):
        return F.group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps
        )


class Signed(Renamed):
    def forward(self, x):
        return -super().forward(x)


class Line(nn.BatchNorm1d):
    pass


class Map(nn.BatchNorm2d):
    pass


class Volume(nn.BatchNorm3d):
    pass


@pytest.mark.parametrize(
    ('norm', 'why'),
    [
        (NormAct(8), 'NormAct, which computes something else'),
        (Signed(2, 8), 'Signed, which computes something else'),
        (nn.BatchNorm2d(8, track_running_stats=False), 'no statistics'),
        (nn.InstanceNorm2d(8), 'is no BatchNorm or GroupNorm'),
    ],
)
def test_norms_that_are_more_than_norms_are_refused(norm, why):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm)
    with pytest.raises(ValueError, match=f'norm after 0 is a .*{why}'):
        convert(model, norm=dict(outer_affine='channel'), inputs=image())


@pytest.mark.parametrize(
    ('conv', 'norm', 'base'),
    [
        (nn.Conv1d, Line, nn.BatchNorm1d),
        (nn.Conv2d, Map, nn.BatchNorm2d),
        (nn.Conv3d, Volume, nn.BatchNorm3d),
    ],
)
def test_norms_of_another_name_are_known(conv, norm, base):
    x = torch.randn(2, 3, *[5] * (1 + '123'.index(conv.__name__[4])))
    model = randomize(nn.Sequential(conv(3, 8, 1), norm(8)))
    assert isinstance(norm(8), base)
    new = convert(model, norm={}, inputs=x)
    assert torch.equal(new[1].running_var, model[1].running_var)


def test_norms_of_timm():
    layers = pytest.importorskip('timm.layers')
    options = dict(norm=dict(outer_affine='channel'), inputs=image())
    gn = nn.Sequential(nn.Conv2d(3, 8, 1), layers.GroupNorm(8, 4)).eval()
    randomize(gn)
    x = image()
    new = convert(gn, **options)
    assert type(new[1]) is BCN
    assert relative_error(new(x), gn(x)) <= 1e-4
    bare = layers.BatchNormAct2d(8, apply_act=False)
    new = convert(nn.Sequential(nn.Conv2d(3, 8, 1), bare), **options)
    assert type(new[1]) is BCN
    more = nn.Sequential(nn.Conv2d(3, 8, 1), layers.BatchNormAct2d(8))
    with pytest.raises(ValueError, match='is a BatchNormAct2d, which comp'):
        convert(more, **options)


def test_batch_norm_without_affine_becomes_bcn_with_one():
    norm = randomize(nn.BatchNorm2d(8, affine=False))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm)
    new = convert(model, norm=dict(affine=True), inputs=image())[1]
    assert torch.equal(new.bn_weight, torch.ones(8))
    assert not new.bn_bias.any()
    assert torch.equal(new.running_var, norm.running_var)


def test_nothing_to_convert_is_said():
    bare = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match='nothing to convert: no convolution'):
        convert(bare, {}, inputs=image())
    with pytest.raises(ValueError, match=r"in parts=\['0'\]"):
        convert(bare, {}, inputs=image(), parts=['0'])


def test_convert_refuses_what_it_cannot_prove():
    source = Net(nn.Conv2d, nn.BatchNorm2d)
    with pytest.raises(ValueError, match='auxiliary is not reached'):
        convert(source, {}, inputs=image())
    part = convert(source, {}, inputs=image(), parts=['conv1'])
    assert type(part.conv2) is nn.Conv2d
    assert type(part.conv1) is WSConv2d
    with pytest.raises(ValueError, match="parts='neck'.*conv1, bn1"):
        convert(source, {}, inputs=image(), parts=['neck'])
    two = Run(
        lambda m, x: m.a(y := m.conv(x)) + m.b(y),
        conv=nn.Conv2d(3, 8, 1),
        a=nn.BatchNorm2d(8),
        b=nn.BatchNorm2d(8),
    )
    with pytest.raises(ValueError, match='conv feeds a and b'):
        convert(two, {}, inputs=image())
    subclass = nn.Sequential(ConvWS2d(3, 8, 1), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match='0 is a ConvWS2d'):
        convert(subclass, {}, inputs=image())
    instance = nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8))
    with pytest.raises(ValueError, match='0 is a InstanceNorm2d'):
        convert(instance, norm={}, inputs=image())


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


def test_hook_names_what_levels_share(monkeypatch):
    said = []
    monkeypatch.setattr(
        'ws_mm.hooks.print_log', lambda text, **_: said.append(text)
    )
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
        hook.after_train_iter(runner, 0)
        assert len(said) == count
        # It looks once and leaves nothing behind.
        assert not head['bbox_head'][0]._forward_pre_hooks
    assert said[0].startswith('2 BCN layers ran on maps of several sizes')
    assert 'bbox_head.0, bbox_head.1' in said[0]
    assert 'model.bbox_head.norm_cfg=dict(' in said[0]
