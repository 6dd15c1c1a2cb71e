"""Rows of the host contract: checkpoints."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule, PretrainedInit, Sequential
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader, checkpoint
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from proofs.peers.authors import BCNorm
from proofs.peers.rows import main

BN = dict(type='BN')
GN = dict(type='GN', num_groups=4)
BCN = dict(type=BCNorm, num_groups=4)


def net(norm: dict, conv: str | None = None) -> BaseModule:
    """A convolution and a norm as the host names them."""
    conv_cfg = conv and dict(type=conv)
    return Sequential(ConvModule(3, 8, 3, conv_cfg=conv_cfg, norm_cfg=norm))


def load(source: nn.Module, target: nn.Module) -> str:
    """Return what the host logs while it loads one into the other."""
    said: list[str] = []
    with mock.patch.object(
        checkpoint, 'print_log', lambda text, **_: said.append(str(text))
    ):
        checkpoint.load_state_dict(target, source.state_dict())
    words = ('unexpected key', 'missing keys', 'size mismatch')
    found = [word for word in words if word in ' '.join(said)]
    return f'warns of {", ".join(found)}, and goes on' if found else 'no word'


def plain_into_ws() -> str:
    """A plain backbone into a standardized one."""
    return '; '.join(
        f'{name}: {load(net(norm), net(norm, "ConvWS"))}'
        for name, norm in (('ConvWS + BN', BN), ('ConvWS + GN', GN))
    )


def norms_into_bcn() -> str:
    """BN and GN into the authors' BCN, which has entries of both."""
    return '; '.join(
        f"{name} into the authors' BCN: {load(net(norm), net(BCN))}"
        for name, norm in (('BN', BN), ('GN', GN))
    )


def gn_into_bn() -> str:
    """GN into BN."""
    return f'GN into BN: {load(net(GN), net(BN))}'


def groups() -> str:
    """GN of other groups: nothing in a checkpoint tells."""
    other = dict(type='GN', num_groups=2)
    return f'GN of 4 groups into GN of 2: {load(net(GN), net(other))}'


def initializer() -> str:
    """An initializer of one's own that loads, as a user would write it."""

    class Mine(PretrainedInit):
        def __call__(self, module: nn.Module) -> None:
            super().__call__(module)

    WEIGHT_INITIALIZERS.register_module('Mine', force=True, module=Mine)
    source = net(GN)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'w.pth')
        torch.save(source.state_dict(), path)
        target = net(GN)
        target.init_cfg = dict(type='Mine', checkpoint=path)
        target.init_weights()
    kept = torch.equal(target[0].conv.weight, source[0].conv.weight)
    return 'loaded' if kept else 'overwritten by the init_weights of its parts'


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (self.proof,)


def code() -> str:
    """A checkpoint that runs a command."""
    with tempfile.TemporaryDirectory() as folder:
        proof, path = os.path.join(folder, 'ran'), os.path.join(folder, 'w')
        torch.save(dict(state_dict={}, x=Payload(proof)), path)
        CheckpointLoader.load_checkpoint(path)
        ran = os.path.exists(proof)
    return 'mmengine warns and runs it' if ran else 'refused'


def safetensors() -> str:
    """A .safetensors file given to the host."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'w.safetensors')
        save_file(net(BN).state_dict(), path)
        CheckpointLoader.load_checkpoint(path)
    return 'read'


ROWS = {
    'plain_into_ws': plain_into_ws,
    'norms_into_bcn': norms_into_bcn,
    'gn_into_bn': gn_into_bn,
    'groups': groups,
    'initializer': initializer,
    'code': code,
    'safetensors': safetensors,
}

if __name__ == '__main__':
    main(ROWS)
