"""Baked and folded models compute the same, or are rejected."""

import pytest
import torch
import torch.nn.functional as F
from comparison import HALF_ON_CPU, relative_error
from small_nets import Net, Run, image, layers, randomize
from torch import nn
from torch.nn.utils import prune

from ws_mm import BCN, WSConv2d, WSConvTranspose2d, bake, check, convert


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
    assert vars(baked.conv1).keys() == vars(nn.Conv2d(1, 1, 1)).keys()
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


@pytest.mark.parametrize('fold', [False, True])
def test_what_is_frozen_stays_frozen(fold):
    net = randomize(Net()).eval()
    for layer in (net.conv1, net.bn2):  # its norm
        layer.requires_grad_(False)
    baked = bake(net, image(), fold_estimates=fold)
    for name, layer in baked.named_children():
        frozen = name in ('conv1', 'bn2')
        assert {p.requires_grad for p in layer.parameters()} == {not frozen}


def test_fold_without_affines():
    net = Net(norm=lambda c: BCN(c, 4, affine=False)).double()
    randomize(net).eval()
    x = image(torch.float64)
    baked = bake(net, x, fold_estimates=True)
    assert relative_error(baked(x), net(x)) <= 1e-12


def changed_by_a_view(m, x):
    y = m.conv(x)
    y[:, :4].relu_()
    return m.bn(y)


def changed_by_data(m, x):
    y = m.conv(x)
    y.data.relu_()
    return m.bn(y)


def written_over(m, x):
    y = m.conv(x)
    torch.add(m.plain(x), 1, out=y.data)
    return m.bn(y)


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
        (changed_by_a_view, 'bn does not follow'),
        (changed_by_data, 'bn does not follow'),
        (written_over, 'bn does not follow'),
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


class Gained(WSConv2d):
    """Changes the weight alone, by what it keeps."""

    def __init__(self, *args, gain: float = 2.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gains = nn.Parameter(torch.full((self.out_channels,), gain))
        self.register_buffer('offset', torch.full((1,), 0.5))

    def standardized_weight(self, dtype=None):
        weight = super().standardized_weight(dtype)
        return weight * self.gains.view(-1, 1, 1, 1) + self.offset


class Shifted(Gained):
    """Changes the output, too."""

    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize('fold', [False, True])
def test_a_subclass_with_another_weight_is_baked(fold):
    net = randomize(Net(Gained, lambda c: BCN(c, 4))).eval()
    x = image()
    baked = bake(net, x, fold_estimates=fold)
    kinds = {type(m) for m in baked.modules() if isinstance(m, nn.Conv2d)}
    assert kinds == {nn.Conv2d}
    assert baked.conv1.state_dict().keys() <= {'weight', 'bias'}
    assert relative_error(baked(x), net(x)) <= 2e-6


def test_a_subclass_with_another_output_is_not_baked():
    with pytest.raises(ValueError, match='only the convolutions of ws_mm'):
        bake(Shifted(3, 8, 1))
    weight = nn.utils.parametrizations.weight_norm(Gained(3, 8, 1))
    with pytest.raises(ValueError, match='only the convolutions of ws_mm'):
        bake(weight)


def test_a_weight_that_a_hook_computes_is_not_baked():
    model = randomize(nn.Sequential(WSConv2d(3, 8, 1), BCN(8, 4))).eval()
    prune.l1_unstructured(model[0], 'weight', 0.3)
    with pytest.raises(ValueError, match='0: only.*torch.nn.utils.prune'):
        bake(model)
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), BCN(8, 4)).eval()
    prune.l1_unstructured(plain[0], 'weight', 0.3)
    with pytest.raises(ValueError, match='fold the estimates: 0 is a Conv2d'):
        bake(plain, image(), fold_estimates=True)
    prune.remove(model[0], 'weight')
    x = image()
    baked = bake(model, x, fold_estimates=True)
    assert relative_error(baked(x), model(x)) <= 2e-6


@pytest.mark.parametrize(
    'kind', ['ws_mm.WSConv2d', WSConv2d, 'ws_mm.CenteredConv2d'], ids=str
)
def test_a_baked_network_that_builds_convolutions_builds_plain_ones(kind):
    pytest.importorskip('mmpretrain.models')
    from mmpretrain.registry import MODELS

    conv_cfg = dict(type=kind)
    repvgg = dict(type='RepVGG', arch='A0', conv_cfg=conv_cfg)
    net = randomize(MODELS.build(repvgg)).double()
    net.eval()  # returns nothing
    x = image(torch.float64)
    baked = bake(net)
    baked.switch_to_deploy()
    assert net.conv_cfg == conv_cfg
    own = WSConv2d if kind is WSConv2d else MODELS.get(kind)
    assert {type(m) for m in net.modules() if isinstance(m, nn.Conv2d)} == {
        own
    }
    assert relative_error(baked(x)[-1], net(x)[-1]) <= 1e-10


class WithoutBias(nn.Conv2d):
    """Leaves out the bias that folding gives it."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, 'bias': False})

    def forward(self, input):
        return self._conv_forward(input, self.weight, None)


def clamped(module, args, output):
    return output.clamp(-0.2, 0.2)


@pytest.mark.parametrize('kind', ['hook', 'forward'])
def test_a_fold_that_computes_something_else_is_refused(kind):
    conv = WithoutBias if kind == 'forward' else WSConv2d
    net = randomize(Net(conv, lambda c: BCN(c, 4))).eval()
    if kind == 'hook':
        net.conv1.register_forward_hook(clamped)
    for values in (*net.bn1.parameters(), *net.bn2.parameters()):
        values.data.mul_(1e-4)  # small, but as wrong
    x = image()
    bake(net, x)
    match = (
        r'behind conv[12] would compute something else \(relative difference '
        r'[1-9]\.\de[-+]0[0-2]\)'
    )
    for inputs in (x, lambda model: model(x)):
        with pytest.raises(ValueError, match=match):
            bake(net, inputs, fold_estimates=True)


def test_a_fold_may_round():
    model = randomize(Run(lambda m, x: m.bn(m.conv(x)), **layers())).eval()
    for values in (model.conv.bias, model.bn.running_mean):
        values.data.add_(1000)
    # The shift cancels what the convolution adds, to 1000 * 2^-24.
    bake(model, image(), fold_estimates=True)


def test_bake_leaves_the_model_as_it_was():
    model = randomize(Net()).train()
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bake(model, lambda m: m.train()(image()), fold_estimates=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    training = {name for name, m in model.named_modules() if m.training}
    assert training == {name for name, _ in model.named_modules()} - {'bn1'}
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_nothing_to_fold_needs_no_inputs():
    model = nn.Sequential(WSConv2d(3, 8, 1), nn.GroupNorm(4, 8))
    assert type(bake(model, fold_estimates=True)[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ('run', 'inputs'),
    [
        (lambda m, x: m.bn(m.conv(input=x)), image),
        (lambda m, x: m.bn(m.up(x, output_size=(24, 24))), image),
        (lambda m, x: m.bn(m.conv(x)), lambda: lambda m: m.train()(image())),
        (lambda m, x: m.bn(m.doubled(x)), image),
    ],
    ids=['keyword', 'output_size', 'trains', 'pre-hook'],
)
def test_a_fold_is_compared_as_its_convolution_is_called(run, inputs):
    model = Run(run, **layers(), doubled=WSConv2d(3, 8, 1))
    model.up = WSConvTranspose2d(3, 8, 3, stride=2, padding=1)
    model.doubled.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    model, x = randomize(model).eval(), image()
    baked = bake(model, inputs(), fold_estimates=True)
    assert type(baked.bn) is nn.GroupNorm
    assert relative_error(baked(x), model(x)) <= 2e-6


def test_a_mask_head_without_a_box_is_folded():
    detection = pytest.importorskip('torchvision.models.detection')
    head = detection.mask_rcnn.MaskRCNNHeads(3, [8, 8], 1, nn.BatchNorm2d)
    head, x = convert(head, conv={}, norm={}, inputs=image()), image()
    randomize(head).eval()
    # As a detector calls it for an image in which it finds nothing.
    baked = bake(head, lambda m: m(x[:0]), fold_estimates=True)
    assert relative_error(baked(x), head(x)) <= 2e-6


def test_a_fold_of_a_norm_that_is_called_by_keyword():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = WSConv2d(3, 8, 1), BCN(8, 4)

        def forward(self, x):
            return self.norm(input=self.conv(x))

    model, x = randomize(ByName()).double().eval(), image(torch.float64)
    baked = bake(model, x, fold_estimates=True)
    assert isinstance(baked.norm, nn.GroupNorm)
    assert not isinstance(baked.norm, BCN)
    assert relative_error(baked.norm(baked.conv(x)), model(x)) < 1e-12


def test_a_fold_that_overflows_is_refused():
    if not HALF_ON_CPU:
        pytest.skip('this torch has no float16 convolution on a CPU')
    model = nn.Sequential(WSConv2d(3, 8, 1), BCN(8, 4)).half().eval()
    model[1].running_mean.fill_(400)
    model[1].running_var.zero_()  # a shift of 126,000, where 65,504 is most
    with pytest.raises(ValueError, match='cannot fold the estimates'):
        bake(model, image(torch.float16), fold_estimates=True)
