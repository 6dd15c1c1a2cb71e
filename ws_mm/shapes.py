"""Build and run models whose weights take no memory and have no values."""

import contextlib
import io
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.overrides import TorchFunctionMode

from .replacement import BATCH_NORMS
from .running_statistics import RunningStatistics

# Pixels: whatever a host pools or strides by fits in. On a CPU it takes time.
SIZES = {'meta': 1024, 'cpu': 256}
# Keys of weights beside init_cfg. timm's networks load them when built.
WEIGHTS = ('pretrained', 'checkpoint_path')
# In place, whether torch.nn.init or a tensor calls them.
INITIALIZERS = {name for name in vars(nn.init) if name.endswith('_')}


def build_without_memory(model: Mapping[str, Any], scope: str) -> nn.Module:
    """Build a model whose weights take no memory and have no values.

    Pretrained weights are not looked for, and hosts print nothing.

    Args:
        model: ``model`` of a config.
        scope: ``default_scope`` of the config.
    """
    bare = _without_weights(model)
    with (
        DefaultScope.overwrite_default_scope(scope),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter('ignore')
        try:
            with _WeightsOnMeta():
                return MODELS.build(ConfigDict(bare))  # type: ignore[no-any-return]
        except (NotImplementedError, RuntimeError, TypeError) as error:
            # A constructor that computes with the values of its weights.
            if 'meta' not in str(error):
                raise
            return MODELS.build(ConfigDict(bare))  # type: ignore[no-any-return]


class _WeightsOnMeta(TorchFunctionMode):
    """Put what layers allocate on the meta device.

    Other factories stay on the CPU: constructors read numbers from them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Values that nobody will read: most of the time of a build.
        if (
            getattr(func, '__name__', '') in INITIALIZERS
            and args
            and isinstance(args[0], torch.Tensor)
            and args[0].is_meta
        ):
            return args[0]
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get('device') is None:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


def _without_weights(value: Any) -> Any:
    """Copy the config of a model without its checkpoints."""
    if isinstance(value, dict):
        return {
            key: no_weights(inner)
            if key in (*WEIGHTS, 'init_cfg', 'teacher_ckpt')
            else _without_weights(inner)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(_without_weights(item) for item in value)
    return value


def no_weights(value: Any) -> bool | None:
    """Return the value in the place of this one that loads no weights.

    mmpretrain's TIMMBackbone takes a bool.
    """
    return False if isinstance(value, bool) else None


def batch_norms(model: nn.Module) -> list[str]:
    """List the names of the batch norms."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS)
    ]


def map_sizes(
    model: nn.Module, scope: str
) -> tuple[dict[str, set[torch.Size]], list[str]]:
    """Measure the maps (H, W) that norms of groups or estimates run on.

    The model runs on one image whose values take no memory. An operation
    without such a form, as mmcv's own ones are, makes it run again on a CPU
    with weights of zero. What comes behind an error there is not seen.

    Args:
        model: built; its weights have no values afterwards.
        scope: ``default_scope`` of its config: 'mmdet', 'mmseg' or another.

    Returns:
        The sizes by the names of the norms; and the names of convolutions
        that no forward calls in a module that runs: it reads their weights,
        or does not use them.
    """
    sizes: dict[str, set[torch.Size]] = {}
    ran: set[nn.Module] = set()
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda one, _: ran.add(one))
        )
        if isinstance(module, (nn.GroupNorm, RunningStatistics)):
            seen = sizes.setdefault(name, set())
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, seen=seen: seen.add(args[0].shape[2:])
                )
            )
    complete = False
    try:
        for device in SIZES:
            ran.clear()
            for seen in sizes.values():
                seen.clear()
            # Whatever a model may raise that takes something else.
            with contextlib.suppress(Exception):
                run_with_zeros(model, scope, device)
                complete = True
                break
    finally:
        for handle in handles:
            handle.remove()
    return sizes, _uncalled(model, ran) if complete else []


def _uncalled(model: nn.Module, ran: set[nn.Module]) -> list[str]:
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if isinstance(module, nn.modules.conv._ConvNd) and module not in ran:
            above = name.rpartition('.')[0]
            # A ConvModule is one layer to the module that holds it.
            if type(modules[above]).__name__ == 'ConvModule':
                above = above.rpartition('.')[0]
            if above and modules[above] in ran:
                found.append(name)
    return found


def image_channels(model: nn.Module) -> int:
    """Return how many channels the images of a model have.

    Its first convolution takes them. YOLOX's Focus gives its convolution
    four pixels of each channel.
    """
    pixels = 1
    for module in model.modules():
        if type(module).__name__ == 'Focus':
            pixels = 4
        if isinstance(module, nn.Conv2d):
            return module.in_channels // pixels
    return 3


@torch.no_grad()
def run_with_zeros(
    model: Any, scope: str, device: str = 'cpu', size: int | None = None
) -> None:
    """Run a model on one image, with weights of zero.

    Args:
        model: built, with or without memory; in eval mode afterwards.
        scope: see :func:`map_sizes`.
        device: 'cpu', or 'meta', which computes shapes only.
        size: height and width of the image in pixels; one of the device's
            own if None.
    """
    model.to_empty(device=device)
    # mmdet's backbones return None from it.
    model.eval()
    for values in (*model.parameters(), *model.buffers()):
        values.zero_()
    size = size or SIZES[device]
    channels = image_channels(model)
    image = torch.zeros(1, channels, size, size, device=device)
    if scope == 'mmdet':
        from mmdet.structures import (  # type: ignore[import-untyped]
            DetDataSample,
        )

        names = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
        meta: dict[str, Any] = dict.fromkeys(names, (size, size))
        sample = DetDataSample(metainfo={**meta, 'scale_factor': (1.0, 1.0)})
        model(image, [sample], mode='tensor')
        return
    model(image, mode='tensor')
    # Auxiliary heads only run in training.
    features = model.extract_feat(image)
    heads = getattr(model, 'auxiliary_head', None) or []
    for head in heads if isinstance(heads, nn.ModuleList | list) else [heads]:
        head(features)
