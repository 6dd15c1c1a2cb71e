"""What mmdet, mmseg and mmengine do to a layer, on their own models."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from comparison import relative_error
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import (
    turn_on_efficient_conv_bn_eval,
)
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ws_mm import BCN, WSConv2d, bake

mmdet = pytest.importorskip('mmdet.models', exc_type=ImportError)
mmseg = pytest.importorskip('mmseg.models', exc_type=ImportError)
bricks = pytest.importorskip('mmcv.cnn')

WS = dict(type='ws_mm.WSConv2d')
BCN4 = dict(type='ws_mm.BCN', num_groups=4)
BN = dict(type='BN')


def resnet(depth: int = 18, **options) -> nn.Module:
    """mmdet's ResNet, an eighth as wide."""
    options = dict(base_channels=8, norm_eval=False) | options
    return mmdet.ResNet(depth, **options)


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """A model in eval mode, its norms with the state of a trained one's."""
    for name, values in model.named_buffers():
        if name.endswith('running_mean'):
            values.normal_()
        elif name.endswith('running_var'):
            values.uniform_(0.2, 3)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, BCN)):
            for parameter in module.parameters():
                parameter.normal_().add_(parameter.sign() * 0.2)
    # mmdet's train() returns nothing.
    model.eval()
    return model


def image(size: int = 32, images: int = 1) -> Tensor:
    return torch.randn(images, 3, size, size)


def features(model: nn.Module, x: Tensor) -> Tensor:
    """All outputs of a backbone as one vector."""
    return torch.cat([level.flatten() for level in model(x)])


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(
        torch.equal(after[name], before[name]) for name in before
    )


@pytest.mark.parametrize('bias', [False, True])
def test_fusing_a_norm_into_a_ws_conv_is_refused(bias: bool) -> None:
    block = bricks.ConvModule(3, 8, 3, conv_cfg=WS, norm_cfg=BN, bias=bias)
    trained(block)
    before, x = tensors(block), image()
    expected = block(x)
    for fuse in (
        bricks.fuse_conv_bn,
        lambda block: fuse_conv_bn_eval(block.conv, block.bn),
    ):
        with pytest.raises(RuntimeError, match=r'fuse_conv_bn.*ws_mm\.bake'):
            fuse(block)
        assert unchanged(block, before)
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize('norm', [BN, BCN4], ids=['BN', 'BCN'])
@pytest.mark.parametrize('depth', [18, 50])
def test_a_baked_model_can_be_fused(depth: int, norm: dict) -> None:
    model = trained(resnet(depth, conv_cfg=WS, norm_cfg=norm).double())
    x = image().double()
    expected = features(model, x)
    baked = bake(model)
    fused = bricks.fuse_conv_bn(copy.deepcopy(baked))
    found = {type(module) for module in fused.modules()}
    assert WSConv2d not in found
    assert nn.BatchNorm2d not in found
    assert relative_error(features(fused, x), expected) < 1e-10
    if norm is BN:
        # Refused, the model is as it was; BCN is never fused with anything.
        with pytest.raises(RuntimeError, match='fuse_conv_bn'):
            bricks.fuse_conv_bn(model)
    else:
        bricks.fuse_conv_bn(model)
    assert torch.equal(features(model, x), expected)


@pytest.mark.parametrize('norm', [BN, BCN4], ids=['BN', 'BCN'])
def test_efficient_conv_bn_eval_of_the_runner_is_refused(norm: dict) -> None:
    # As the Runner does with efficient_conv_bn_eval=['backbone'].
    model = nn.Module()
    model.backbone = resnet(conv_cfg=WS, norm_cfg=norm)
    refused = pytest.raises(TypeError, match='efficient_conv_bn_eval')
    with refused:
        turn_on_efficient_conv_bn_eval(model, ['backbone'])
    assert 'forward' not in vars(model.backbone)
    model.backbone = resnet(norm_cfg=BCN4)
    with refused:
        turn_on_efficient_conv_bn_eval(model, ['backbone'])
    baked = trained(bake(resnet(conv_cfg=WS, norm_cfg=BN)))
    model.backbone, x = baked, image()
    expected = features(model.backbone, x)
    turn_on_efficient_conv_bn_eval(model, ['backbone'])
    assert relative_error(features(model.backbone, x), expected) < 1e-4


def test_efficient_conv_bn_eval_of_conv_module_is_refused() -> None:
    options = dict(conv_cfg=WS, efficient_conv_bn_eval=True)
    block = bricks.ConvModule(3, 8, 3, norm_cfg=BN, **options)
    block(image(images=2))
    with pytest.raises(RuntimeError, match='efficient_conv_bn_eval'):
        trained(block)(image())
    # No BatchNorm, nothing to fuse.
    block = bricks.ConvModule(3, 8, 3, norm_cfg=BCN4, **options)
    plain = bricks.ConvModule(3, 8, 3, norm_cfg=BCN4, conv_cfg=WS)
    plain.load_state_dict(trained(block).state_dict())
    x = image()
    assert torch.equal(block.eval()(x), plain.eval()(x))


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group, which SyncBN of mmcv wants to be built in."""
    dist.init_process_group(
        'gloo', store=dist.HashStore(), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def sync(implementation: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: convert_sync_batchnorm(model, implementation)


@pytest.mark.parametrize(
    'change',
    [sync('torch'), sync('mmcv'), revert_sync_batchnorm],
    ids=['sync_bn=torch', 'sync_bn=mmcv', 'revert'],
)
@pytest.mark.usefixtures('one_process')
def test_sync_bn_leaves_bcn_alone(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(
        resnet(conv_cfg=WS, norm_cfg=BCN4), nn.BatchNorm2d(8)
    )
    trained(model)
    x, before = image(), tensors(model)
    expected = features(model[0], x)
    ours = [m for m in model.modules() if isinstance(m, (BCN, WSConv2d))]
    changed = change(model)
    found = [m for m in changed.modules() if isinstance(m, (BCN, WSConv2d))]
    assert all(a is b for a, b in zip(found, ours, strict=True))
    assert unchanged(changed, before)
    assert torch.equal(features(changed[0], x), expected)


@pytest.mark.parametrize('implementation', ['torch', 'mmcv'])
@pytest.mark.usefixtures('one_process')
def test_ws_conv_before_a_converted_sync_bn(implementation: str) -> None:
    block = bricks.ConvModule(3, 8, 3, conv_cfg=WS, norm_cfg=BN)
    trained(block)
    x = image()
    expected = block(x)
    converted = convert_sync_batchnorm(copy.deepcopy(block), implementation)
    assert type(converted.bn).__name__ == 'SyncBatchNorm'
    assert relative_error(converted.eval()(x), expected) < 1e-6
    reverted = revert_sync_batchnorm(converted)
    assert torch.equal(reverted(x), expected)
