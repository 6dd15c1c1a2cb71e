"""Rows of the host contract: layers."""

import copy
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import timm.layers
import torch
import torch.distributed as dist
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmdet.models import FCNMaskHead, ResNeSt, ResNet
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import (
    turn_on_efficient_conv_bn_eval,
)
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmseg.models.decode_heads import ASPPHead
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from proofs.peers.authors import BCNorm
from proofs.peers.rows import main, observe
from support.tensors import relative_error

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
BY_BATCH = NORMS["authors' BCN"] | dict(estimate=False)


def together(rows: dict[str, Callable[[], str]]) -> str:
    """The observations of several layers in one line."""
    return '; '.join(f'{name}: {observe(row)}' for name, row in rows.items())


def off(actual: Tensor, expected: Tensor) -> str:
    """Describe the error of a result."""
    error = relative_error(actual, expected)
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
    """Norms after a conversion to SyncBN and back."""
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


def resnet(norm: dict, **options: object) -> nn.Module:
    """A ResNet-18 of mmdet, an eighth as wide, in training, one output."""
    torch.manual_seed(0)
    model = ResNet(
        18, base_channels=8, out_indices=[3], norm_cfg=norm, **options
    )
    model.train()
    return model


def frozen() -> str:
    """Norms that stay at mean 0 and variance 1, from scratch."""

    def of(norm: dict, **options: object) -> str:
        model = resnet(norm, **options)
        model(image(2, 64))
        state = model.state_dict()
        means = [k for k in state if k.endswith('running_mean')]
        still = sum(not state[name].any() for name in means)
        return f'{still} of {len(means)} estimates never move, no word'

    norms = NORMS | {"authors' BCN by batch": BY_BATCH}
    return together(
        {
            f'{name}, {option}={value}': lambda norm=norm, o=option, v=value: (
                of(norm, **{'norm_eval': False, o: v})
            )
            for option, value in (('norm_eval', True), ('frozen_stages', 1))
            for name, norm in norms.items()
            if name != 'GN'
        }
    )


def no_boxes() -> str:
    """A mask head of mmdet on the RoIs of an image without boxes."""

    def of(norm: dict) -> str:
        head = FCNMaskHead(
            2, in_channels=8, conv_out_channels=8, norm_cfg=norm
        )
        loss = head(torch.zeros(0, 8, 14, 14)).sum()
        loss.backward()
        missing = sum(p.grad is None for p in head.parameters())
        finite = all(v.isfinite().all() for v in head.state_dict().values())
        return (
            f'loss {float(loss)}, buffers {"finite" if finite else "NaN"}, '
            f'{missing} parameters without gradient'
        )

    return together({name: lambda n=n: of(n) for name, n in NORMS.items()})


def checkpointing() -> str:
    """Activation checkpointing by with_cp against none."""
    recompute = torch.utils.checkpoint.checkpoint

    def of(norm: dict, reentrant: bool) -> str:
        found = []
        for with_cp in (False, True):
            model = resnet(norm, with_cp=with_cp, norm_eval=False)
            with mock.patch(
                'torch.utils.checkpoint.checkpoint',
                partial(recompute, use_reentrant=reentrant),
            ):
                (output,) = model(image(2, 64))
            torch.manual_seed(2)
            output.backward(torch.randn_like(output))
            state = model.state_dict()
            name = next((k for k in state if k.endswith('running_mean')), '')
            name = name.replace('bn1', 'layer1.0.bn1')
            found.append((model.layer1[0].conv1.weight.grad, state.get(name)))
        (grad, mean), (other, twice) = found
        moved = mean is None or torch.equal(mean, twice)
        return (
            f'gradient {off(other, grad)}, estimates '
            f'{"as without" if moved else "moved twice"}'
        )

    return together(
        {
            f'{name}, reentrant={r}': lambda n=n, r=r: of(n, r)
            for r in (True, False)
            for name, n in NORMS.items()
        }
    )


def zero_init() -> str:
    """Gradients of a residual branch, the second step from scratch."""

    def of(norm: dict) -> str:
        model = resnet(norm, zero_init_residual=True, norm_eval=False)
        model.init_weights()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            (output,) = model(image(2, 64))
            torch.manual_seed(2)
            output.backward(torch.randn_like(output))
            optimizer.step()
        branch = model.layer1[0]
        dead = [n for n, p in branch.named_parameters() if not p.grad.any()]
        return (
            f'{len(dead)} of {len(list(branch.parameters()))} parameters dead'
        )

    return together({name: lambda n=n: of(n) for name, n in NORMS.items()})


def optimizer() -> str:
    """Weight decay of norms under norm_decay_mult=0, and layer-wise decay."""

    class ConvNeXt(nn.Module):
        def __init__(self, norm: dict) -> None:
            super().__init__()
            block = ConvModule(3, 8, 3, norm_cfg=norm)
            self.stages = nn.ModuleList([nn.ModuleList([block])])

    def of(norm: dict, kind: str, **paramwise: object) -> str:
        model = nn.Module()
        model.backbone = ConvNeXt(norm)
        config = dict(
            optimizer=dict(type='SGD', lr=1.0, weight_decay=1.0),
            constructor=kind,
            paramwise_cfg=paramwise,
        )
        with DefaultScope.overwrite_default_scope('mmdet'):
            built = build_optim_wrapper(model, config).optimizer
        norm_layer = model.backbone.stages[0][0].norm
        named = {p: name for name, p in norm_layer.named_parameters()}
        decayed = [
            named[p]
            for group in built.param_groups
            for p in group['params']
            if p in named and group['weight_decay']
        ]
        return f'{", ".join(decayed) or "nothing"} of the norm is decayed'

    cases = {
        'norm_decay_mult=0': partial(
            of, kind='DefaultOptimWrapperConstructor', norm_decay_mult=0.0
        ),
        'layer-wise': partial(
            of,
            kind='LearningRateDecayOptimizerConstructor',
            decay_rate=0.5,
            num_layers=6,
        ),
    }
    return together(
        {
            f'{name}, {case}': partial(run, norm)
            for case, run in cases.items()
            for name, norm in NORMS.items()
        }
    )


def pooled() -> str:
    """One image through ASPP, with its pooled branch, in training."""

    def of(norm: dict) -> str:
        head = ASPPHead(
            dilations=(1,),
            in_channels=16,
            channels=64,
            num_classes=2,
            norm_cfg=norm,
        )
        output = head([torch.randn(1, 16, 8, 8)])
        output.backward(torch.randn_like(output))
        finite = all(v.isfinite().all() for v in head.state_dict().values())
        return f'trains, buffers {"finite" if finite else "NaN"}'

    return together({name: lambda n=n: of(n) for name, n in NORMS.items()})


def one_per_group() -> str:
    """One image through ResNeSt, whose attention pools 32 channels."""

    def of(norm: dict) -> str:
        model = ResNeSt(
            depth=50,
            num_stages=1,
            strides=[1],
            dilations=[1],
            out_indices=[0],
            norm_eval=False,
            norm_cfg=norm,
        )
        model.train()
        model(image(1, 64))
        return 'trains'

    return together(
        {
            'BN': lambda: of(NORMS['BN']),
            'GN': lambda: of(dict(type='GN', num_groups=32)),
            "authors' BCN": lambda: of(dict(type=BCNorm)),
        }
    )


def odd_channels() -> str:
    """Norms of 32 groups on 48, 18, 168 and 26 channels."""
    kinds = {
        'GN': lambda channels: nn.GroupNorm(32, channels),
        'timm GroupNormAct': lambda channels: timm.layers.GroupNormAct(
            channels, 32
        ),
        "authors' BCN": lambda channels: BCNorm(channels, 32),
    }

    def of(kind: Callable[[int], nn.Module]) -> str:
        for channels in (48, 18, 168, 26):
            kind(channels)(torch.randn(1, channels, 3, 3))
        return 'ok'

    return together({name: lambda k=k: of(k) for name, k in kinds.items()})


ROWS = {
    'fuse': fuse,
    'efficient_conv_bn_eval': efficient_conv_bn_eval,
    'sync_bn': sync_bn,
    'frozen': frozen,
    'no_boxes': no_boxes,
    'checkpointing': checkpointing,
    'zero_init': zero_init,
    'optimizer': optimizer,
    'pooled': pooled,
    'one_per_group': one_per_group,
    'odd_channels': odd_channels,
}

if __name__ == '__main__':
    logging.disable(logging.WARNING)
    main(ROWS)
