"""Layers that convert replaces, leaves or rejects."""

import copy
from types import MethodType
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from comparison import relative_error
from networks import log_of_convert  # noqa: F401
from small_nets import Net, Run, image, randomize
from torch import nn
from torch.nn.utils import prune

from ws_mm import BCN, WSConv2d, check, convert
from ws_mm.replacement import ws_type
from ws_mm.running_statistics import RunningStatistics


class ConvWS2d(nn.Conv2d):
    """Named as mmcv's."""


class RMSNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * x.square().mean(1, keepdim=True).rsqrt() * self.weight


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
    assert torch.equal(new.bn1.weight, torch.ones(4))


def test_convert_gn_to_bcn_is_exact():
    eps = 0.01
    source = Net(nn.Conv2d, lambda c: nn.GroupNorm(4, c, eps)).double()
    del source.auxiliary
    randomize(source)
    x = image(torch.float64)
    new = convert(source, norm={})
    assert type(new.conv1) is nn.Conv2d
    assert type(new.bn1) is BCN
    new.eval()
    # The estimates' variance is 1, to which BCN adds its eps.
    twin = copy.deepcopy(source)
    for norm in (twin.bn1, twin.bn2):
        norm.eps = eps * (1 + eps)
    assert relative_error(new(x), twin(x)) <= 1e-12
    # An affine per channel is the GroupNorm's own, as are its groups.
    assert repr(convert(source, norm={})) == repr(new)
    per_group = dict(outer_affine='group')
    with pytest.raises(ValueError, match=r"bn1: .*outer_affine='channel'"):
        convert(source, norm=per_group)
    with pytest.raises(ValueError, match='bn1: .*4 groups, .* has 2: another'):
        convert(source, norm=dict(num_groups=2))
    with pytest.raises(ValueError, match='bn1: .*would drop the weight'):
        convert(source, norm=dict(affine=False))
    for bn in (source.bn1, source.bn2):
        for values in (bn.weight, bn.bias):
            values.data = values[:4].repeat_interleave(2).detach()
    new = convert(source, norm=per_group).eval()
    assert new.bn1.weight.shape == (4,)
    assert new.bn1.weight.is_contiguous()
    assert relative_error(new(x), source(x)) <= 1e-4


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        # As a residual branch begins: its output hides the activation.
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.relu(super().forward(x))


class Pair(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x), x


class Detached(nn.Module):
    """The frozen norm of DETR, whose eps is a number of its forward."""

    affine = 'weight', 'bias'

    def __init__(self, channels):
        super().__init__()
        for name in (*self.affine, 'running_mean', 'running_var'):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        weight, bias = (self.get_buffer(name) for name in self.affine)
        scale = weight * (self.running_var + 1e-5).rsqrt()
        shift = bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class Scaled(Detached):
    """The frozen norm of somebody who has other names."""

    affine = 'gamma', 'beta'


class Shaped(nn.Module):
    """The frozen norm of somebody who has other shapes."""

    def __init__(self, channels):
        super().__init__()
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            self.register_buffer(name, torch.ones(1, channels, 1, 1))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return (x - self.running_mean) * scale + self.bias


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
    ('norm', 'result', 'why'),
    [
        (NormAct(8), 'cannot', 'NormAct computes something else than a norm'),
        (
            Signed(2, 8),
            'nothing to',
            'Signed computes something else than a norm',
        ),
        (
            nn.BatchNorm2d(8, track_running_stats=False),
            'cannot',
            'BatchNorm2d keeps no statistics',
        ),
        (
            nn.InstanceNorm2d(8, track_running_stats=True),
            'nothing to',
            'InstanceNorm2d is no BatchNorm or GroupNorm',
        ),
        (
            prune.random_unstructured(nn.BatchNorm2d(8), 'weight', 0.5),
            'cannot',
            'BatchNorm2d has no weight and bias of its own',
        ),
        (Scaled(8), 'cannot', 'Scaled has no weight and bias of its own'),
        (Pair(8), 'cannot', 'Pair computes something else than a norm'),
        (Shaped(8), 'cannot', 'Shaped keeps its values in another shape'),
    ],
)
def test_norms_that_are_more_than_norms_are_refused(norm, result, why):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm)
    said = rf'{result} convert: .*{why}: 1 layer \(1\)'
    with pytest.raises(ValueError, match=said):
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


@pytest.mark.parametrize('norm', [Detached(8), Map(8, affine=False)])
def test_norms_without_an_eps_or_an_affine_are_known(norm):
    new = convert(randomize(nn.Sequential(norm)), norm={})[0]
    assert type(new) is BCN
    assert torch.equal(new.running_var, norm.running_var)
    assert new.eps == 1e-5
    assert new.affine == (norm.weight is not None)


def test_a_layer_is_judged_without_its_hooks():
    norm, seen = Map(8), []
    norm.register_forward_hook(lambda *_: seen.append(1))
    assert type(convert(nn.Sequential(norm), norm={})[0]) is BCN
    assert not seen


def test_norms_of_timm():
    layers = pytest.importorskip('timm.layers')
    options = dict(norm=dict(outer_affine='channel'), inputs=image())
    gn = nn.Sequential(nn.Conv2d(3, 8, 1), layers.GroupNorm(8, 4)).eval()
    randomize(gn)
    x = image()
    new = convert(gn, **options)
    assert type(new[1]) is BCN
    assert relative_error(new(x), gn(x)) <= 1e-4


def test_what_a_norm_drops_is_dropped_before_its_activation():
    layers = pytest.importorskip('timm.layers')
    norm = layers.BatchNormAct2d(
        8, act_layer=nn.Sigmoid, drop_layer=nn.Dropout
    )
    y = convert(nn.Sequential(norm), norm={}).train()(torch.randn(1, 8, 4, 4))
    assert (y == 0.5).any()
    assert not (y == 0).any()


def test_batch_norm_without_affine_becomes_bcn_with_one():
    norm = randomize(nn.BatchNorm2d(8, affine=False))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm)
    new = convert(model, norm=dict(affine=True), inputs=image())[1]
    assert torch.equal(new.bn_weight, torch.ones(8))
    assert not new.bn_bias.any()
    assert torch.equal(new.running_var, norm.running_var)


def test_of_a_batch_norm_of_zeros_the_outer_weight_is_zero():
    norm = randomize(nn.BatchNorm2d(8))
    nn.init.zeros_(norm.weight)
    nn.init.zeros_(norm.bias)
    new = convert(nn.Sequential(norm), norm={})[0]
    assert torch.equal(new.bn_weight, torch.ones(8))
    assert not new.weight.any()


def test_norms_without_an_affine_become_bcn():
    for norm in (
        nn.BatchNorm2d(8, affine=False),
        nn.GroupNorm(4, 8, affine=False),
    ):
        new = convert(randomize(nn.Sequential(norm)), norm={})[0]
        assert type(new) is BCN
        assert not new.affine


@pytest.mark.parametrize(
    ('run', 'standardized', 'why'),
    [
        (lambda m, x: m.bn(F.relu(m.conv(x))), True, ''),
        (lambda m, x: m.bn(y := m.conv(x)) + m.other(y), True, ''),
        (
            lambda m, x: m.bn(torch.cat([m.conv(x), x], 1)[:, :8]),
            True,
            '',
        ),
        (
            lambda m, x: m.gn(torch.cat([m.conv(x), x], 1)[:, :8]),
            False,
            'mixed',
        ),
        (lambda m, x: m.bn(m.conv(x) + x[:, :1]), False, 'mixed'),
        (
            lambda m, x: m.bn(y := m.conv(x)) + m.other(y + x[:, :1]),
            False,
            'mixed',
        ),
        (lambda m, x: m.bn(m.conv(x)) + m.conv(x), False, 'something else'),
        (lambda m, x: m.bn(m.conv(x).sigmoid()), False, ''),
    ],
)
def test_a_filter_whose_scale_is_seen_stays(run, standardized, why, said):
    more = dict(other=nn.BatchNorm2d(8), gn=nn.GroupNorm(4, 8))
    model = Run(run, conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8), **more)
    new = convert(model, {}, {}, inputs=image())
    assert (type(new.conv) is WSConv2d) == standardized
    assert type(new.bn) is BCN
    assert not check(new, image()).mistakes
    assert why in said[0]
    assert ('Left as they are' in said[0]) == bool(why)


@pytest.mark.parametrize(
    ('norm', 'standardized'),
    [
        (nn.InstanceNorm2d(8), True),
        (BCN(8, 4), True),
        (nn.GroupNorm(4, 8), False),
    ],
)
def test_a_norm_of_each_channel_sees_no_other_scale(norm, standardized, said):
    def run(m, x):
        return m.first(m.conv(x)) + m.norm(torch.cat([m.conv(x), x], 1)[:, :8])

    model = Run(
        run, conv=nn.Conv2d(3, 8, 1), norm=norm, first=nn.BatchNorm2d(8)
    )
    if standardized:
        new = convert(model, {}, inputs=image())
        assert type(new.conv) is WSConv2d
        words = 'ws_mm.convert: 1 convolutions now standardize their filters'
        assert said == [words]
    else:
        with pytest.raises(ValueError, match='mixed'):
            convert(model, {}, inputs=image())


def test_nothing_to_convert_is_said():
    bare = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match=r'no convolution .* any other norm'):
        convert(bare, {}, inputs=image())
    before = nn.Sequential(nn.BatchNorm2d(3), *bare)
    with pytest.raises(ValueError, match=r'here: BatchNorm2d: 1 layer \(0\)$'):
        convert(before, {}, inputs=image())
    foreign = nn.Sequential(nn.Conv2d(3, 8, 1), RMSNorm(8))
    with pytest.raises(ValueError, match=r'here: RMSNorm: 1 layer \(1\)$'):
        convert(foreign, {}, inputs=image())
    with pytest.raises(ValueError, match='give conv={}, norm={} or both'):
        convert(bare)
    norm = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match='nothing to convert: no BatchNorm'):
        convert(norm, norm={}, parts='0')
    with pytest.raises(ValueError, match='nothing to convert: no BatchNorm'):
        convert(norm, norm={}, skip=['1'])
    foreign = nn.Sequential(ConvWS2d(3, 8, 1), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match=r'ConvWS2d standardizes .* \(0\)'):
        convert(foreign, {}, inputs=image())
    assert type(convert(foreign, {}, {}, inputs=image())[0]) is ConvWS2d


def test_convert_refuses_what_it_cannot_prove():
    source = Net(nn.Conv2d, nn.BatchNorm2d)
    with pytest.raises(ValueError, match=r"reached.*skip=\['auxiliary'\]"):
        convert(source, {}, inputs=image())
    with pytest.raises(ValueError, match='give inputs='):
        convert(source, {})
    part = convert(source, {}, inputs=image(), parts='conv1')
    assert type(part.conv2) is nn.Conv2d
    assert type(part.conv1) is WSConv2d
    most = convert(source, {}, inputs=image(), skip=['auxiliary', 'conv1'])
    assert type(most.conv2) is WSConv2d
    assert type(most.conv1) is nn.Conv2d
    with pytest.raises(ValueError, match="parts='neck'.*conv1, bn1"):
        convert(source, {}, inputs=image(), parts=['neck'])
    with pytest.raises(ValueError, match="skip='neck'.*conv1, bn1"):
        convert(source, norm={}, skip=['neck'])


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (
            dict(conv={}, inputs=image()),
            r'reached by the inputs: 4 layers \(head.0, head.2, head.3, '
            r"...\)\. .*skip=\['head', 'heads.1'\]$",
        ),
        (
            dict(norm={}),
            r'NormAct .*: 2 layers \(head.1, heads.3\)\. .*'
            r"skip=\['head', 'heads.3'\]$",
        ),
    ],
)
def test_as_few_names_as_hold_what_to_leave(options, said):
    def run(m, x):
        return m.heads[2](m.heads[0](x))

    def conv():
        return nn.Conv2d(3, 3, 1)

    model = Run(
        run,
        head=nn.Sequential(conv(), NormAct(3), conv(), conv()),
        heads=nn.Sequential(conv(), conv(), nn.BatchNorm2d(3), NormAct(3)),
    )
    with pytest.raises(ValueError, match=said):
        convert(model, **options)


def test_norms_that_shared_their_affine_are_named(said):
    model = nn.Sequential(*(nn.BatchNorm2d(8) for _ in range(3)))
    model[2].weight = model[0].weight
    convert(model, norm={})
    words = 'are no longer those of other layers: 2 layers (0, 2)'
    assert said[0].endswith(words)


def test_what_was_converted_is_not_named_again(said):
    model = nn.Sequential(BCN(8, 4), nn.BatchNorm2d(8))
    convert(model, norm={})
    assert said == ['ws_mm.convert: 1 norms are now BCN']


@pytest.mark.parametrize(
    ('options', 'error', 'said'),
    [
        (dict(conv=dict(epss=1)), TypeError, "did you mean 'eps'"),
        (dict(conv=dict(stride=2)), TypeError, r'conv=dict\(stride=2\)'),
        (dict(conv=dict(eps_mode='in')), ValueError, r'conv=dict\(eps_mode='),
        (dict(conv=dict(eps=-1)), ValueError, r'conv=dict\(eps='),
        (dict(conv=True), TypeError, 'conv=True must be a dict'),
        (dict(conv=dict(type='Conv2d')), ValueError, 'makes WSConv1d'),
        (dict(norm=dict(momentun=1)), TypeError, "did you mean 'momentum'"),
        (dict(norm=dict(num_features=8)), TypeError, 'num_features=8'),
        (dict(norm=dict(device='cpu')), TypeError, "no argument 'device'"),
        (dict(norm=dict(momentum=2)), ValueError, r'norm=dict\(momentum='),
        (dict(norm=dict(mode='x')), ValueError, r'norm=dict\(mode='),
        (dict(norm=dict(num_groups='8')), TypeError, r'norm=dict\(num_group'),
        (dict(norm=dict(type='BN')), ValueError, 'makes BCN'),
        (
            dict(norm=dict(num_groups=5, strict_groups=True)),
            ValueError,
            r'bn1: num_groups=5 .*norm=dict\(',
        ),
    ],
)
def test_arguments_of_convert_are_refused_in_its_words(options, error, said):
    source = Net(nn.Conv2d, nn.BatchNorm2d)
    with pytest.raises(error, match=said) as caught:
        convert(source, **options, inputs=image())
    for word in ('_cfg', 'config', 'checkpoint', '_delete_'):
        assert word not in str(caught.value)
    named = dict(type='ws_mm.WSConv2d'), dict(type=BCN)
    convert(source, *named, inputs=image(), skip=['auxiliary'])


def test_converted_layers_are_what_their_holders_hold():
    def run(m, x):
        return m.held[1](m.held[0](x))

    model = Run(run, conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8))
    model.held = [model.conv, model.bn]  # torch does not see these
    model.seen = []
    model.bn.register_forward_hook(lambda *_: None)
    model.bn.requires_grad_(False)
    model.bn.stage = 3
    new = convert(model, {}, {}, inputs=image())
    assert [type(layer) for layer in new.held] == [WSConv2d, BCN]
    assert new.held[1] is new.bn
    assert len(new.bn._forward_hooks) == 1
    assert new.bn.stage == 3
    assert not any(p.requires_grad for p in new.bn.parameters())
    assert new.conv.weight.requires_grad


@pytest.mark.parametrize('old', [nn.BatchNorm2d(8), nn.GroupNorm(4, 8)])
@pytest.mark.parametrize('frozen', ['weight', 'bias'])
def test_each_parameter_learns_if_it_did(old, frozen):
    # Networks of re-identification learn a scale behind their last layer,
    # and no shift.
    old = copy.deepcopy(old)
    getattr(old, frozen).requires_grad_(False)
    new = convert(nn.Sequential(old), norm={})[0]
    learned = {name for name, p in new.named_parameters() if p.requires_grad}
    other = {'weight': 'bias', 'bias': 'weight'}[frozen]
    assert learned == {other, f'bn_{other}'}


def test_a_parameter_that_the_norm_had_not_learns_if_another_does():
    class Curved(RunningStatistics):
        statistics: ClassVar = {'running_mean': 0.0}

        def __init__(self, num_features):
            super().__init__()
            self.slope = nn.Parameter(torch.ones(num_features))
            self.register_statistics(num_features)

    old = nn.BatchNorm2d(8)
    learned = []
    for own in (old.weight, old.bias):
        new = convert(nn.Sequential(old), norm=dict(type=Curved))[0]
        learned.append(new.slope.requires_grad)
        own.requires_grad_(False)
    new = convert(nn.Sequential(old), norm=dict(type=Curved))[0]
    assert [*learned, new.slope.requires_grad] == [True, True, False]


def test_what_a_network_keeps_of_its_parameters_is_not_copied():
    # LeViT keeps its biases of attention from one evaluation to the next.
    timm = pytest.importorskip('timm')
    levit = timm.create_model('levit_128s', img_size=64, num_classes=5).eval()
    new = convert(levit, norm={}, inputs=torch.randn(1, 3, 64, 64))
    for module in (*levit.modules(), *new.modules()):
        assert not getattr(module, 'attention_bias_cache', None)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(conv={}), ': bake before {}(), which reads raw filters: 32'),
        (dict(norm={}), ': {}() would take the new norm for a BatchNorm: 32'),
    ],
)
def test_methods_that_would_fuse_new_layers_are_named(options, words, said):
    timm = pytest.importorskip('timm')
    model = timm.create_model('repghostnet_050')
    convert(model, inputs=torch.randn(1, 3, 64, 64), **options)
    assert words.format('reparameterize') in said[0]


class Switched(nn.Sequential):
    fuse = False


class Pyramid(nn.Sequential):
    def fuse(self, maps):
        return sum(maps)


@pytest.mark.parametrize('kind', [Switched, Pyramid])
def test_another_thing_of_such_a_name_is_not_named(kind, said):
    assert type(convert(kind(nn.BatchNorm2d(8)), norm={})[0]) is BCN
    assert said == ['ws_mm.convert: 1 norms are now BCN']


def test_a_network_that_would_fuse_new_layers_is_named(said):
    models = pytest.importorskip('mmpretrain.models', exc_type=ImportError)
    arch = dict(
        num_blocks=[1, 1, 1, 1],
        width_factor=[0.1, 0.1, 0.1, 0.1],
        group_layer_map=None,
        stem_channels=8,
        se_cfg=None,
    )
    convert(models.RepVGG(arch), norm={})
    words = 'switch_to_deploy() would take the new norm for a BatchNorm'
    assert f'{words}: 1 layer (the model); ' in said[0]
    layer = pytest.importorskip('timm.models.levit').ConvNorm(3, 8)
    convert(layer, norm={})
    assert words.replace('switch_to_deploy', 'fuse') in said[1]


def test_layers_that_only_run_in_training_are_reached():
    def run(m, x):
        y = m.bn(m.conv(x))
        return (y, m.aux_bn(m.aux(y))) if m.training else y

    more = dict(aux=nn.Conv2d(8, 8, 1), aux_bn=nn.BatchNorm2d(8))
    model = Run(run, conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8), **more)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r'lambda model: model\.train'):
        convert(model.eval(), {}, inputs=image())
    new = convert(model, {}, {}, inputs=lambda m: m.train()(image()))
    assert type(new.aux) is WSConv2d
    assert not model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(new.bn.running_var, before['bn.running_var'])


def test_filters_of_one_entry_stay():
    depthwise = nn.Conv2d(3, 3, 1, groups=3)
    two = nn.Conv2d(3, 3, (1, 2), groups=3)
    model = nn.Sequential(depthwise, nn.BatchNorm2d(3), two)
    new = convert(model.append(nn.BatchNorm2d(3)), {}, {}, inputs=image())
    assert [type(layer) for layer in new] == [nn.Conv2d, BCN, WSConv2d, BCN]


def test_a_weight_that_is_computed_stays():
    from torch.nn.utils.parametrizations import spectral_norm

    conv = spectral_norm(nn.Conv2d(3, 8, 1))
    model = nn.Sequential(conv, nn.BatchNorm2d(8))
    new = convert(model, {}, {}, inputs=image())
    assert type(new[0]) is type(conv)
    assert type(new[1]) is BCN


@pytest.mark.parametrize('number', [0, 1])
def test_a_forward_that_was_replaced_is_not_taken_for_its_class(number):
    # As by tools that count, offload or cast. It would stay in the new layer.
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    layer = model[number]
    layer.forward = MethodType(type(layer).forward, layer)
    if number:
        with pytest.raises(ValueError, match=r'another forward .*\(1\)'):
            convert(model, norm={})
    else:
        new = convert(model, {}, {}, inputs=image())
        assert [type(layer) for layer in new] == [nn.Conv2d, BCN]


def test_padding_that_is_another_at_even_sizes_is_no_plain_one():
    class Odd(nn.Conv2d):
        def forward(self, x):
            sides = []
            for size, stride in zip(x.shape[:1:-1], self.stride, strict=True):
                total = max(-(-size // stride) * stride - stride + 3 - size, 0)
                sides += [total // 2, total - total // 2]
            return F.conv2d(
                F.pad(x, sides), self.weight, self.bias, self.stride
            )

    odd, plain = Odd(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 3, 2, 1)
    plain.load_state_dict(odd.state_dict())
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(odd(x), plain(x))
    assert ws_type(odd) is None


class Ordered(nn.Conv2d):
    """A convolution with the order of its inputs."""

    def __init__(self, *order, **options):
        super().__init__(len(order), 8, 1, **options)
        order = torch.tensor(order, device=options.get('device'))
        self.register_buffer('order', order)

    def forward(self, x):
        return super().forward(x[:, self.order])


@pytest.mark.parametrize(
    ('order', 'device', 'plain'),
    [
        ((0, 1, 2), 'cpu', True),
        ((2, 0, 1), 'cpu', False),
        ((2, 0, 1), 'meta', False),
    ],
)
def test_whole_numbers_of_a_layer_stay_its_own(
    order, device, plain, monkeypatch
):
    # Memory that nothing was written to holds anything.
    empty = torch.empty_like
    monkeypatch.setattr(
        torch, 'empty_like', lambda *args, **kw: empty(*args, **kw).fill_(99)
    )
    found = ws_type(Ordered(*order, device=device))
    assert found is (WSConv2d if plain else None)


def test_a_layer_that_takes_other_inputs_than_any_stays():
    class Blocks(nn.Conv2d):
        def forward(self, x):
            assert x.shape[-1] % 12 == 0
            return super().forward(x)

    model = nn.Sequential(Blocks(3, 8, 3), nn.BatchNorm2d(8))
    new = convert(model, {}, {}, inputs=image())
    assert [type(layer) for layer in new] == [Blocks, BCN]


def test_a_causal_convolution_stays():
    class Causal(nn.Conv1d):
        def forward(self, x):
            return super().forward(F.pad(x, (2, 0)))

    model = nn.Sequential(Causal(3, 8, 3), nn.BatchNorm1d(8))
    new = convert(model, {}, {}, inputs=torch.randn(1, 3, 9))
    assert [type(layer) for layer in new] == [Causal, BCN]


def test_a_transposed_convolution_of_somebody_stays():
    class Up(nn.ConvTranspose2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.GroupNorm(4, 8),
        Up(8, 8, 2, 2),
        nn.GroupNorm(4, 8),
    )
    made = convert(model, conv={}, inputs=image())
    assert isinstance(made[0], WSConv2d)
    assert type(made[2]) is Up


@pytest.mark.parametrize(
    ('old', 'norm', 'groups'),
    [
        # A GN is exact at any size.
        (lambda: nn.GroupNorm(4, 64), {}, 4),
        (lambda: nn.BatchNorm2d(64), {}, 32),
        (lambda: nn.BatchNorm2d(64), dict(num_groups=4), 4),
        (lambda: nn.BatchNorm2d(128), {}, 32),
    ],
)
def test_groups_on_maps_of_one_pixel(old, norm, groups):
    old = old()
    channels = len(old.weight)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, channels, 1)
    model = randomize(nn.Sequential(*pooled, old)).double().eval()
    x = image(torch.float64)
    made = convert(model, norm=norm, inputs=x)
    assert made[2].num_groups == groups
    if isinstance(old, nn.GroupNorm):
        assert relative_error(made(x), model(x)) < 1e-9


def test_groups_of_a_norm_that_runs_on_larger_maps_too(said):
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), norm)
    x = torch.randn(1, 8, 4, 4)
    new = convert(model, norm=dict(num_groups=8), inputs=x)
    assert new[2].num_groups == 4
    for words in ('maps of several sizes', 'channels alone, on 1x1 maps'):
        assert f'{words}: 1 layer (0)' in said[0]
    # A norm of channels is asked for no groups.
    new = convert(model, norm=dict(type='ws_mm.MABN'), inputs=x)
    assert type(new[0]).__name__ == 'MABN'


def test_an_affine_of_another_size_is_not_taken_over():
    class Pairs(RunningStatistics):
        statistics: ClassVar = {'running_mean': 0.0}

        def __init__(self, num_features):
            super().__init__()
            self.num_features = num_features
            self.weight = nn.Parameter(torch.ones(num_features // 2))
            self.register_statistics(num_features)

    model = nn.Sequential(nn.BatchNorm2d(8))
    assert convert(model, norm=dict(type=Pairs))[0].weight.shape == (4,)


def test_norms_without_values_are_converted():
    norm = nn.GroupNorm(4, 8, device='meta')
    made = convert(nn.Sequential(norm), norm=dict(outer_affine='group'))
    assert all(values.is_meta for values in made.state_dict().values())
    assert made[0].weight.shape == (4,)


def test_a_norm_in_half_precision_gets_exact_estimates():
    norm = randomize(nn.BatchNorm2d(8)).half()
    new = convert(nn.Sequential(norm), norm={})[0]
    assert {p.dtype for p in new.parameters()} == {torch.half}
    assert new.running_var.dtype == torch.float
    assert torch.equal(new.running_var, norm.running_var.float())


@pytest.mark.parametrize(
    'place', [dict(device='meta'), dict(dtype=torch.half)]
)
def test_a_norm_without_any_tensor_goes_where_its_model_is(place):
    norm = nn.GroupNorm(4, 8, affine=False)
    source = nn.Sequential(nn.Conv2d(3, 8, 1, **place), norm)
    new = convert(source, norm=dict(affine=True))[1]
    assert {p.device for p in new.parameters()} == {source[0].weight.device}
    assert new.running_var.device == source[0].weight.device
    assert {p.dtype for p in new.parameters()} == {source[0].weight.dtype}


@pytest.mark.filterwarnings('ignore')
def test_a_script_is_named():
    script = torch.jit.script(nn.BatchNorm2d(8))
    for model, name in (
        (script, 'the model'),
        (nn.Sequential(nn.BatchNorm2d(8), script), '1'),
    ):
        with pytest.raises(TypeError, match=f'{name} is a script of Torch'):
            convert(model, norm={})
    assert type(convert(model, norm={}, skip=['1'])[0]) is BCN


def test_a_norm_that_does_not_know_its_channels_is_named():
    with pytest.raises(ValueError, match='has not run yet'):
        convert(nn.Sequential(nn.LazyBatchNorm2d()), norm={})
