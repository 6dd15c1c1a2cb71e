"""Loading checkpoints of other layouts into BCN."""

from collections import OrderedDict
from pathlib import Path

import pytest
import reference
import torch
from mmengine.model import Sequential, initialize
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    load_state_dict,
    weights_to_cpu,
)
from torch import nn

from ws_mm import BCN, PretrainedGN, WSConv2d, bake
from ws_mm.checkpoint import (
    CENTERED,
    differing_prefixes,
    from_batch_norm,
    mark_standardized,
    to_native_layout,
    without_prefix,
)
from ws_mm.conv import WSConv1d
from ws_mm.zoo import CenteredConv2d


def authors_layout(inner: str) -> dict[str, torch.Tensor]:
    return {
        'weight': torch.randn(1, 4, 1),
        'bias': torch.randn(1, 4, 1),
        f'{inner}.weight': torch.randn(12),
        f'{inner}.bias': torch.randn(12),
        f'{inner}.running_mean': torch.randn(12),
        f'{inner}.running_var': torch.rand(12) + 0.1,
        f'{inner}.num_batches_tracked': torch.tensor(7),
        f'{inner}.estbn_moving_speed': torch.zeros(1),
    }


@pytest.mark.parametrize('outer_affine', ['group', 'channel'])
@pytest.mark.parametrize('inner', ['pbn', 'bn'])
def test_authors_layout_keeps_its_function(inner, outer_affine):
    source = authors_layout(inner)
    layer = BCN(12, 4, outer_affine=outer_affine).eval()
    layer.load_state_dict(source)
    x = torch.randn(2, 12, 5, 5)
    expected, _ = reference.batch_channel_norm(
        x,
        {
            'weight': source['weight'].flatten(),
            'bias': source['bias'].flatten(),
            'bn_weight': source[f'{inner}.weight'],
            'bn_bias': source[f'{inner}.bias'],
            'running_mean': source[f'{inner}.running_mean'],
            'running_var': source[f'{inner}.running_var'],
        },
        4,
        training=False,
        momentum=1,
    )
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-5)


class Net(nn.Module):
    """Names as OpenMMLab's ResNet gives them: a conv, then its norm."""

    def __init__(self, norm: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name
        self.conv1 = nn.Conv2d(3, 12, 3)
        self.add_module(name, norm)
        self.downsample = nn.Sequential(nn.Conv2d(12, 12, 1), type_of(norm))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.downsample(getattr(self, self.name)(self.conv1(x)))


def type_of(norm: nn.Module) -> nn.Module:
    if isinstance(norm, BCN):
        return BCN(12, 4, outer_affine=norm.outer_affine)
    if isinstance(norm, nn.GroupNorm):
        return nn.GroupNorm(4, 12)
    return nn.BatchNorm2d(12)


def randomize(net: nn.Module) -> nn.Module:
    for values in net.state_dict().values():
        if values.is_floating_point():
            values.uniform_(0.1, 2)
    return net.eval()


def test_pretrained_gn_keeps_the_function(tmp_path):
    source = randomize(Net(nn.GroupNorm(4, 12), 'gn1'))
    path = str(tmp_path / 'gn.pth')
    torch.save({'state_dict': source.state_dict()}, path)
    target = randomize(Net(BCN(12, 4, outer_affine='channel'), 'bn1'))
    seen = []
    where = lambda storage, name: seen.append(name) or storage  # noqa: E731
    PretrainedGN(path, map_location=where)(target)
    assert seen
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-4)


def test_pretrained_gn_takes_a_prefix_and_names_it(tmp_path):
    source = randomize(Net(nn.GroupNorm(4, 12), 'gn1'))
    state = source.state_dict(prefix='module.encoder_q.')
    path = str(tmp_path / 'moco.pth')
    torch.save({'state_dict': state | {'module.queue': torch.ones(2)}}, path)
    target = randomize(Net(BCN(12, 4, outer_affine='channel'), 'bn1'))
    with pytest.raises(ValueError, match=r"Set .*prefix='module\.encoder_q"):
        PretrainedGN(path)(target)
    for prefix in ('module.encoder_q.', 'module.encoder_q'):
        randomize(target)
        PretrainedGN(path, prefix)(target)
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-4)
    torch.save({'other.a': torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"it has 'other\.a'.*, the model 'b"):
        PretrainedGN(path)(target)
    for empty in ({}, dict(state_dict={})):
        torch.save(empty, path)
        with pytest.raises(ValueError, match="it has nothing, the model 'b"):
            PretrainedGN(path)(target)


def test_pretrained_gn_renames_whole_names_alone(tmp_path):
    def net(norm: nn.Module, name: str) -> nn.Module:
        # Names that only begin or end as 'module.' or 'gn' does.
        return nn.ModuleDict(
            {
                'module1': nn.ModuleDict({'module': nn.Conv2d(3, 12, 1)}),
                'align': nn.Conv2d(12, 12, 1),
                'gn_proj': nn.Conv2d(12, 12, 1),
                name: norm,
            }
        )

    path = save(randomize(net(nn.GroupNorm(4, 12), 'gn')), tmp_path)
    target = randomize(net(BCN(12, 4, outer_affine='channel'), 'bn'))
    PretrainedGN(path)(target)
    loaded = target.state_dict()
    for name, values in torch.load(path).items():
        name = name.replace('gn.', 'bn.') if name[:3] == 'gn.' else name
        assert torch.equal(loaded[name], values), name


NAMES = [*torch.nn.Transformer(8, 2, 1, 1, 8).state_dict()]
OTHERS = [f'other.{index}' for index in range(2 * len(NAMES))]


@pytest.mark.parametrize(
    ('theirs', 'ours', 'expected'),
    [
        (['k.' + n for n in NAMES], NAMES, ('k.', '')),
        (NAMES, ['net.' + n for n in NAMES] + OTHERS, ('', 'net.')),
        (
            ['k.' + n for n in NAMES],
            ['net.' + n for n in NAMES],
            ('k.', 'net.'),
        ),
        # A part of the model, or the model a part.
        (['k.' + n for n in NAMES[:8]], NAMES, ('k.', '')),
        (['k.' + n for n in NAMES[:8]] + OTHERS, NAMES[:8], ('k.', '')),
        # By accident.
        (['k.' + n for n in NAMES[:4]] + OTHERS, NAMES, ('', '')),
        (['k.' + NAMES[0]], NAMES, ('', '')),
    ],
)
def test_prefixes_are_those_of_most_names(theirs, ours, expected):
    assert differing_prefixes(theirs, ours) == expected


def test_gn_is_rejected_by_an_outer_affine_per_group(tmp_path):
    source = randomize(Net(nn.GroupNorm(4, 12), 'gn1'))
    path = str(tmp_path / 'gn.pth')
    torch.save(source.state_dict(), path)
    target = Net(BCN(12, 4), 'bn1')
    with pytest.raises(ValueError, match="bn1: .*outer_affine='channel'"):
        PretrainedGN(path)(target)


@pytest.mark.parametrize(
    'like',
    [
        torch.empty(0, dtype=torch.half),
        torch.empty(0, dtype=torch.double),
        torch.empty(0, device='meta'),
    ],
    ids=['half', 'double', 'meta'],
)
def test_what_gn_lacks_is_created_as_what_it_has(like):
    target = BCN(12, 4, outer_affine='channel').to('meta')
    state = nn.GroupNorm(4, 12).to(like).state_dict()
    target.load_state_dict(state, assign=True)
    for name, values in target.state_dict().items():
        assert values.device == like.device
        # The estimates are those of the layer built in this dtype.
        own = BCN(12, 4, dtype=like.dtype).state_dict()[name]
        assert values.dtype == own.dtype


def test_batch_norm_is_rejected(tmp_path):
    source = randomize(Net(nn.BatchNorm2d(12), 'bn1'))
    path = str(tmp_path / 'bn.pth')
    torch.save(source.state_dict(), path)
    target = Net(BCN(12, 4, outer_affine='channel'), 'bn1')
    with pytest.raises(ValueError, match='bn1: .*plain BatchNorm'):
        load_checkpoint(target, path)


def test_own_layout_stays():
    source, target = BCN(12, 4), BCN(12, 4)
    for values in source.state_dict().values():
        values.uniform_(0.1, 2)
    load_state_dict(target, source.state_dict(), strict=True)
    torch.testing.assert_close(target.state_dict(), source.state_dict())


def torch_strict(net: nn.Module, path: str) -> None:
    net.load_state_dict(torch.load(path))


def torch_lenient(net: nn.Module, path: str) -> None:
    net.load_state_dict(torch.load(path), strict=False)


def load_from(net: nn.Module, path: str) -> None:
    # What load_from, --resume and test.py come to, with their defaults.
    load_checkpoint(net, path, revise_keys=[(r'^module\.', '')])


def pretrained(net: nn.Module, path: str) -> None:
    initialize(net, dict(type='Pretrained', checkpoint=path))


def pretrained_prefix(net: nn.Module, path: str) -> None:
    state = {f'backbone.{k}': v for k, v in torch.load(path).items()}
    torch.save(state, path)
    cfg = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
    initialize(net, cfg)


def pretrained_gn(net: nn.Module, path: str) -> None:
    initialize(net, dict(type='ws_mm.PretrainedGN', checkpoint=path))


ROUTES = [
    torch_strict,
    torch_lenient,
    load_from,
    pretrained,
    pretrained_prefix,
    pretrained_gn,
]
NORMS = {
    'bn': (nn.BatchNorm2d(12), 'bn1'),
    'gn named bn': (nn.GroupNorm(4, 12), 'bn1'),
    'gn': (nn.GroupNorm(4, 12), 'gn1'),
}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that the package logs."""
    lines: list[str] = []
    for module in ('ws_mm.norm', 'ws_mm.conv'):
        monkeypatch.setattr(
            f'{module}.print_log', lambda text, **_: lines.append(text)
        )
    return lines


def save(net: nn.Module, folder: Path) -> str:
    path = str(folder / 'source.pth')
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.parametrize('route', ROUTES)
@pytest.mark.parametrize('kind', NORMS)
def test_every_route_rejects_other_norms(kind, route, tmp_path, said):
    source = randomize(Net(*NORMS[kind]))
    path = save(source, tmp_path)
    target = randomize(Net(BCN(12, 4, outer_affine='channel'), 'bn1'))
    if kind == 'bn' or (kind == 'gn' and route is not pretrained_gn):
        with pytest.raises(ValueError, match='bn1: .*convert_checkpoint.py'):
            route(target, path)
        return
    route(target, path)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-4)
    norms = [line for line in said if 'GroupNorm: weight, bias -> ' in line]
    assert [line.split(':')[0] for line in norms] == ['bn1', 'downsample.1']
    assert 'created bn_weight 1' in norms[0]


@pytest.mark.parametrize('route', ROUTES)
def test_own_and_authors_layouts_load_by_every_route(route, tmp_path, said):
    source = randomize(Net(BCN(12, 4), 'bn1'))
    path = save(source, tmp_path)
    target = randomize(Net(BCN(12, 4), 'bn1'))
    route(target, path)
    torch.testing.assert_close(target.state_dict(), source.state_dict())
    assert not [line for line in said if 'bn' in line]
    state = source.state_dict()
    for norm in ('bn1', 'downsample.1'):
        for name, values in authors_layout('pbn').items():
            state[f'{norm}.{name}'] = values
        for name in ('bn_weight', 'bn_bias', 'running_mean', 'running_var'):
            del state[f'{norm}.{name}']
    torch.save(state, path)
    route(target, path)
    loaded = target.state_dict()
    for norm in ('bn1', 'downsample.1'):
        mean = state[f'{norm}.pbn.running_mean']
        assert torch.equal(loaded[f'{norm}.running_mean'], mean)
        scale = state[f'{norm}.pbn.weight']
        assert torch.equal(loaded[f'{norm}.bn_weight'], scale)
    assert sum("the authors' BCN" in line for line in said) == 2


@pytest.mark.parametrize('route', ROUTES)
@pytest.mark.parametrize(
    ('old', 'new', 'mend'),
    [
        (dict(outer_affine='channel'), {}, "outer_affine='channel'"),
        ({}, dict(num_groups=6), 'num_groups=4'),
        ({}, dict(num_groups=6, outer_affine='channel'), 'num_groups=4'),
    ],
)
def test_bcn_of_other_groups_is_rejected(route, old, new, mend, tmp_path):
    path = save(nn.Sequential(BCN(12, **dict(num_groups=4) | old)), tmp_path)
    target = nn.Sequential(BCN(12, **dict(num_groups=4) | new))
    with pytest.raises(ValueError, match=f'^0: .*Set norm_cfg=.*{mend}'):
        route(target, path)


@pytest.mark.parametrize('route', ROUTES)
def test_outer_affine_per_group_is_repeated_per_channel(route, tmp_path, said):
    source = randomize(nn.Sequential(BCN(12, 4)))
    target = nn.Sequential(BCN(12, 4, outer_affine='channel')).eval()
    route(target, save(source, tmp_path))
    x = torch.randn(2, 12, 5, 5)
    torch.testing.assert_close(target(x), source(x))
    assert '4 groups -> weight, bias of 12 channels' in said[-1]


def test_authors_bcn_of_other_groups_is_rejected():
    for outer_affine in ('group', 'channel'):
        layer = BCN(12, 6, outer_affine=outer_affine)
        with pytest.raises(ValueError, match='num_groups=4'):
            layer.load_state_dict(authors_layout('pbn'))


def test_layers_missing_in_the_checkpoint_stay(tmp_path):
    # A backbone given to a whole model: the heads are not in it.
    net = nn.ModuleDict(dict(a=BCN(12, 4), bn1=BCN(12, 4)))
    source = randomize(BCN(12, 4))
    state = {f'a.{k}': v for k, v in source.state_dict().items()}
    state['other.gn1.weight'] = torch.ones(12)
    load_state_dict(net, state)
    assert torch.equal(net['a'].weight, source.weight)
    assert torch.equal(net['bn1'].weight, torch.ones(4))


def ws_net(norm: str) -> nn.Module:
    """One standardized block, as three kinds of model have it."""
    layer = dict(
        bn=nn.BatchNorm2d(12),
        gn=nn.GroupNorm(4, 12),
        bcn=BCN(12, 4, outer_affine='channel'),
    )[norm]
    return nn.Sequential(WSConv2d(3, 12, 3), layer, WSConv2d(12, 12, 1))


@pytest.mark.parametrize('route', ROUTES)
@pytest.mark.parametrize('norm', ['bn', 'gn', 'bcn'])
def test_plain_filters_given_to_a_ws_model_warn(norm, route, tmp_path, said):
    plain = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.BatchNorm2d(12) if norm == 'bn' else nn.GroupNorm(4, 12),
        nn.Conv2d(12, 12, 1),
    )
    route(ws_net(norm), save(plain, tmp_path))
    warned = [line for line in said if 'does not say' in line]
    assert len(warned) == 1, 'once per checkpoint'
    assert warned[0].startswith('0: ')
    assert 'python tools/model_converters/convert_checkpoint.py' in warned[0]
    # The next checkpoint is another matter.
    route(ws_net(norm), save(plain, tmp_path))
    assert sum('does not say' in line for line in said) == 2


@pytest.mark.parametrize('route', ROUTES)
def test_own_filters_do_not_warn(route, tmp_path, said):
    source = ws_net('gn')
    route(ws_net('gn'), save(source, tmp_path))
    # With a prefix, the host drops what torch wrote about versions.
    expected = 1 if route is pretrained_prefix else 0
    assert sum('does not say' in line for line in said) == expected


@pytest.mark.parametrize('with_meta', [False, True])
@pytest.mark.parametrize(
    ('name', 'is_release'),
    [
        ('resnet50_gn_ws-15beedd8.pth', True),
        ('R-50-GN-WS.pth.tar', True),
        ('rn50_bcn_ws.pth', True),
        ('r50_bn_ws.pth', True),
        ('design_ws.pth', False),
        ('mask_rcnn_r50_fpn_gn_ws-all_2x_coco_20200226-16acb762.pth', True),
        ('resnet50_gn-9186a21c.pth', False),
        ('resnext50_32x4d_gn-c7e8b754.pth', False),
        ('news-gn_wsx.pth', False),
        ('gn_ws/epoch_12.pth', False),
    ],
)
def test_releases_of_ws_networks_are_known_by_name(
    name, is_release, with_meta, tmp_path, said
):
    plain = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.Conv2d(12, 12, 1)
    )
    state = {f'module.{k}': v for k, v in plain.state_dict().items()}
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save(dict(meta={}, state_dict=state) if with_meta else state, path)
    net = ws_net('gn')
    load_from(net, str(path))
    assert torch.equal(net[0].weight, plain[0].weight)
    assert sum('does not say' in line for line in said) == (not is_release)


@pytest.mark.parametrize(
    ('url', 'is_release'),
    [
        ('open-mmlab://jhu/resnet50_gn_ws', True),
        ('openmmlab://jhu/resnext101_32x4d_gn_ws', True),
        ('open-mmlab://jhu/resnext50_32x4d_gn', False),
        ('open-mmlab://detectron/resnet50_gn', False),
        (
            'https://www.cs.jhu.edu/~syqiao/BatchChannelNormalization/'
            'rn50_bcn_ws.pth',
            True,
        ),
        ('http://somewhere/resnet50.pth', False),
    ],
)
def test_releases_of_ws_networks_are_known_by_address(
    url, is_release, said, monkeypatch
):
    plain = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.Conv2d(12, 12, 1)
    )
    asked = []
    # All is mmengine's but the network.
    monkeypatch.setattr(
        'mmengine.runner.checkpoint.load_url',
        lambda url, **_: asked.append(url) or plain.state_dict(),
    )
    pretrained(ws_net('gn'), url)
    assert asked[0].startswith('http')
    assert sum('does not say' in line for line in said) == (not is_release)


def test_copies_without_a_prefix_keep_the_versions(tmp_path, said):
    net = nn.DataParallel(ws_net('gn'))
    for state in (net.state_dict(), net.module.state_dict()):
        copied = without_prefix(state)
        assert list(copied) == list(net.module.state_dict())
        # The network itself has an entry, too, without a dot in its name.
        assert copied._metadata == net.module.state_dict()._metadata
        ws_net('gn').load_state_dict(copied)
        assert not said
        path = tmp_path / 'copied.pth'
        torch.save(dict(state_dict=copied), path)
        load_from(ws_net('gn'), str(path))
        assert not said


def test_checkpoint_without_filters_does_not_warn(said):
    net = ws_net('gn')
    norms = {
        key: value
        for key, value in net.state_dict().items()
        if value.dim() == 1
    }
    assert net.load_state_dict(dict(norms), strict=False).missing_keys
    assert not said


def test_filters_of_a_runner_do_not_warn(tmp_path, said):
    path = str(tmp_path / 'iter_1.pth')
    net = ws_net('gn')
    torch.save(dict(state_dict=weights_to_cpu(net.state_dict())), path)
    load_checkpoint(ws_net('gn'), path)
    assert not said
    baked = bake(net)
    torch.save(dict(state_dict=baked.state_dict()), path)
    load_checkpoint(ws_net('gn'), path)
    assert 'does not say' in said[0]


def test_parts_that_initialise_themselves_do_not_undo_it(tmp_path):
    bricks = pytest.importorskip('mmcv.cnn')

    def net(norm_cfg: dict, init_cfg: dict | None = None) -> nn.Module:
        layers = [
            bricks.ConvModule(3, 12, 1, norm_cfg=norm_cfg),
            Sequential(bricks.ConvModule(12, 12, 1, norm_cfg=norm_cfg)),
        ]
        return Sequential(*layers, init_cfg=init_cfg)

    source = randomize(net(dict(type='GN', num_groups=4)))
    path = save(source, tmp_path)
    target = net(
        dict(type='ws_mm.BCN', num_groups=4, outer_affine='channel'),
        dict(type='ws_mm.PretrainedGN', checkpoint=path),
    ).eval()
    target.init_weights()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-4)


def test_parts_that_the_checkpoint_lacks_are_initialised(tmp_path):
    class Part(nn.Module):
        def init_weights(self) -> None:
            self.initialised = True

    path = save(nn.Sequential(nn.GroupNorm(4, 12)), tmp_path)
    init_cfg = dict(type='ws_mm.PretrainedGN', checkpoint=path)
    norm = BCN(12, 4, outer_affine='channel')
    net = Sequential(norm, Part(), Part(), init_cfg=init_cfg)
    net[2].is_init = True  # by its own checkpoint
    net.init_weights()
    assert net[1].initialised
    assert not hasattr(net[2], 'initialised')


def test_a_batch_norm_without_affine_is_rejected():
    state = nn.BatchNorm2d(12, affine=False).state_dict()
    for target in (BCN(12, 4), BCN(12, 4, affine=False)):
        with pytest.raises(ValueError, match='plain BatchNorm'):
            target.load_state_dict(state, strict=False)


def test_half_of_the_layout_of_the_authors_is_reported_by_torch():
    state = {'bn.running_mean': torch.ones(12), 'bn.weight': torch.ones(12)}
    found = BCN(12, 4).load_state_dict(state, strict=False)
    assert found.unexpected_keys == list(state)
    assert 'weight' in found.missing_keys
    for lacks, own in (('bias', 'bn_bias'), ('running_var', 'running_var')):
        state = authors_layout('pbn')
        del state[f'pbn.{lacks}']
        found = BCN(12, 4).load_state_dict(state, strict=False)
        assert found.missing_keys == [own]
        assert found.unexpected_keys == []


@pytest.mark.parametrize('lacks', ['weight', 'bias'])
def test_half_of_an_outer_affine_is_reported_by_torch(lacks):
    state = BCN(12, 4).state_dict()
    del state[lacks]
    layer = BCN(12, 4, outer_affine='channel')
    with pytest.raises(RuntimeError, match=f'Missing key.*"{lacks}"'):
        layer.load_state_dict(state)


def test_a_bcn_of_other_channels_is_reported_by_torch():
    state = BCN(24, 12).state_dict()
    with pytest.raises(RuntimeError, match='size mismatch for bn_weight'):
        BCN(12, 4).load_state_dict(state)


def test_groups_that_are_not_known_are_not_compared():
    state = dict(BCN(12, 4).state_dict(prefix='0.'))
    assert not to_native_layout({**state}, '0.', 12, 'group')
    said = to_native_layout(state, '0.', 12, 'channel')
    assert 'weight, bias of 4 groups -> weight, bias of 12 channels' in said


def test_a_release_of_the_user_keeps_the_rest_of_its_file(tmp_path):
    path = tmp_path / 'net_gn_ws.pth'
    state = WSConv2d(3, 8, 3).state_dict()
    content = dict(state_dict=state, meta=dict(epoch=3), optimizer={})
    torch.save(content, path)
    found = CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert found['meta'] == dict(epoch=3)
    assert 'optimizer' in found


@pytest.mark.parametrize('wrapped', [False, True])
def test_a_release_keeps_the_versions_of_its_layers(wrapped, tmp_path, said):
    net = nn.Sequential(CenteredConv2d(3, 8, 3), nn.BatchNorm2d(8))
    path = str(tmp_path / 'net_bn_ws.pth')
    source = nn.DataParallel(net) if wrapped else net
    torch.save(dict(state_dict=source.state_dict()), path)
    found = CheckpointLoader.load_checkpoint(path)['state_dict']._metadata
    assert found['0'] == dict(version=CENTERED)
    assert found['1'] == dict(version=nn.BatchNorm2d._version)
    load_from(net, path)
    assert not said


@pytest.mark.parametrize('content', [[1, 2], {'conv.weight': None}, None])
def test_what_is_no_release_is_rejected_by_the_host(content, tmp_path):
    path = str(tmp_path / 'net_gn_ws.pth')
    torch.save(content, path)
    net = WSConv2d(3, 8, 3)
    if isinstance(content, dict):
        load_from(net, path)
        return
    with pytest.raises(RuntimeError, match='No state_dict found'):
        load_from(net, path)


def test_filters_of_one_dimension_are_marked_as_standardized():
    layer = nn.Sequential(WSConv1d(3, 8, 3), nn.Linear(8, 2))
    state = OrderedDict(layer.state_dict())
    mark_standardized(state)
    expected = layer.state_dict()._metadata
    assert state._metadata == {'0': expected['0']}


@pytest.mark.parametrize('affine', [False, True])
def test_a_batch_norm_without_affine_becomes_a_bcn(affine):
    state = nn.BatchNorm2d(12, affine=False).state_dict()
    layer = BCN(12, 4, affine=affine)
    from_batch_norm(state, '', layer.weight)
    layer.load_state_dict(state)  # nothing is missing, nothing too many
