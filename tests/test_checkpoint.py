"""What other checkpoints become when a BCN layer loads them."""

import pytest
import reference
import torch
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from ws_mm import BCN, PretrainedGN


def authors_layout(inner: str) -> dict[str, torch.Tensor]:
    return {
        'weight': torch.randn(1, 4, 1),
        'bias': torch.randn(1, 4, 1),
        f'{inner}.weight': torch.randn(12),
        f'{inner}.bias': torch.randn(12),
        f'{inner}.running_mean': torch.randn(12),
        f'{inner}.running_var': torch.rand(12) + 0.1,
        f'{inner}.num_batches_tracked': torch.tensor(7),
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
    PretrainedGN(path)(target)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-4)


def test_gn_is_refused_by_an_outer_affine_per_group(tmp_path):
    source = randomize(Net(nn.GroupNorm(4, 12), 'gn1'))
    path = str(tmp_path / 'gn.pth')
    torch.save(source.state_dict(), path)
    target = Net(BCN(12, 4), 'bn1')
    with pytest.raises(ValueError, match="bn1: .*outer_affine='channel'"):
        PretrainedGN(path)(target)


def test_batch_norm_is_refused(tmp_path):
    source = randomize(Net(nn.BatchNorm2d(12), 'bn1'))
    path = str(tmp_path / 'bn.pth')
    torch.save(source.state_dict(), path)
    target = Net(BCN(12, 4, outer_affine='channel'), 'bn1')
    with pytest.raises(ValueError, match='bn1: .*plain BatchNorm'):
        load_checkpoint(target, path)


def test_own_layout_is_untouched():
    source, target = BCN(12, 4), BCN(12, 4)
    for values in source.state_dict().values():
        values.uniform_(0.1, 2)
    load_state_dict(target, source.state_dict(), strict=True)
    torch.testing.assert_close(target.state_dict(), source.state_dict())
