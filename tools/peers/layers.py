"""Rows of the host contract: layers."""

import copy
from collections.abc import Callable

import timm.layers
import torch
import torch.distributed as dist
from authors import BCNorm
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import (
    turn_on_efficient_conv_bn_eval,
)
from rows import main, observe
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVS = {
    'mmcv ConvWS': dict(type='ConvWS'),
    'timm StdConv2d': dict(type=timm.layers.StdConv2d),
    'plain conv': None,
}
NORMS = {
    'BN': dict(type='BN'),
    'GN': dict(type='GN', num_groups=4),
    "authors' BCN": dict(type=BCNorm, num_groups=4),
}


def together(rows: dict[str, Callable[[], str]]) -> str:
    """The observations of several layers in one line."""
    return '; '.join(f'{name}: {observe(row)}' for name, row in rows.items())


def off(actual: Tensor, expected: Tensor) -> str:
    """How far a result is from the right one."""
    error = float((actual - expected).abs().max() / expected.abs().max())
    return f'off by {error:.1g} of the largest value' if error > 1e-4 else 'ok'


def image(images: int = 1, size: int = 16) -> Tensor:
    """The same noise in every run."""
    torch.manual_seed(1)
    return torch.randn(images, 3, size, size)


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """Eval mode, and the buffers that training leaves."""
    for name, values in model.named_buffers():
        if name.endswith('running_mean'):
            values.normal_()
        elif name.endswith('running_var'):
            values.uniform_(0.2, 3)
    model.eval()
    return model


def conv_bn(conv: dict | None, **options: object) -> ConvModule:
    """A convolution and a BatchNorm, in eval mode."""
    torch.manual_seed(0)
    block = ConvModule(3, 8, 3, conv_cfg=conv, norm_cfg=NORMS['BN'], **options)
    return trained(block)


def fuse() -> str:
    """Fusion of a WS conv and a BN, by mmcv and by torch."""
    x = image()

    def of_mmcv(conv: dict | None) -> str:
        block = conv_bn(conv)
        return off(fuse_conv_bn(copy.deepcopy(block))(x), block(x))

    def of_torch(conv: dict | None) -> str:
        block = conv_bn(conv)
        fused = fuse_conv_bn_eval(block.conv, block.bn)
        return off(fused(x).relu(), block(x))

    return together(
        {
            f'{tool.__name__}, {name}': lambda tool=tool, conv=conv: tool(conv)
            for tool in (of_mmcv, of_torch)
            for name, conv in CONVS.items()
        }
    )


def efficient_conv_bn_eval() -> str:
    """The option of ConvModule, and the one of the Runner."""
    x = image()

    def of_module(conv: dict | None) -> str:
        block = conv_bn(conv, efficient_conv_bn_eval=True)
        return off(block(x), conv_bn(conv)(x))

    def of_runner(conv: dict | None) -> str:
        block = conv_bn(conv)
        expected = block(x)
        model = nn.Module()
        model.part = nn.Sequential(block.conv, block.bn, block.activate)
        turn_on_efficient_conv_bn_eval(model, ['part'])
        return off(model.part(x), expected)

    return together(
        {
            f'{tool.__name__}, {name}': lambda tool=tool, conv=conv: tool(conv)
            for tool in (of_module, of_runner)
            for name, conv in CONVS.items()
        }
    )


def sync_bn() -> str:
    """What conversion to SyncBN and back makes of norms."""
    dist.init_process_group(
        'gloo', store=dist.HashStore(), rank=0, world_size=1
    )

    def kinds(model: nn.Module) -> str:
        return '+'.join(type(module).__name__ for module in model.modules())

    def converted(norm: nn.Module) -> str:
        x = torch.randn(2, 8, 4, 4)
        expected = trained(norm)(x)
        norm = convert_sync_batchnorm(norm).eval()
        synced = kinds(norm)
        norm = revert_sync_batchnorm(norm)
        return f'{synced}, back {kinds(norm)}, {off(norm(x), expected)}'

    try:
        return together(
            {
                'GN': lambda: converted(nn.GroupNorm(4, 8)),
                "authors' BCN": lambda: converted(BCNorm(8, 4)),
                "authors' BCN by batch": lambda: converted(
                    BCNorm(8, 4, estimate=False)
                ),
            }
        )
    finally:
        dist.destroy_process_group()


ROWS = {
    'fuse': fuse,
    'efficient_conv_bn_eval': efficient_conv_bn_eval,
    'sync_bn': sync_bn,
}

if __name__ == '__main__':
    main(ROWS)
