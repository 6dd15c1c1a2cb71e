"""Build the model of a config and run it once."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from support.checks import BUILD_ERRORS, SetupError
from support.layer_checks import explain

MOST_OBJECTS = 32


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model in eval mode, without pretrained weights.

    The config stays as it is. The model predicts few objects per image.

    Raises:
        SetupError: it cannot be built.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    # Hosts write into what they build from: defaults, even tensors.
    content = copy.deepcopy(cfg.model)
    _predict_few(content)
    try:
        model = MODELS.build(content)
    except (*BUILD_ERRORS, OSError, RuntimeError) as error:
        raise SetupError(
            f'The model of the config cannot be built: {error}'
            f'{explain(cfg, error)}'
        ) from error
    # mmdet's backbones return None from it.
    model.eval()
    return model


def _predict_few(node: Any) -> None:
    """Keep a thousand proposals from running through every mask head."""
    if isinstance(node, dict):
        if 'max_per_img' in node:
            node['max_per_img'] = min(node['max_per_img'], MOST_OBJECTS)
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            _predict_few(value)


def forward_of(
    cfg: Config, model: nn.Module, size: int = 64
) -> Callable[[nn.Module], Any]:
    """Make a function that runs all of a model on one random image.

    A detector runs in the modes 'tensor' and 'predict', or in the one of
    them that it is able to: each leaves out heads of some detectors. A
    segmentor predicts, and its auxiliary heads run, too.

    Args:
        cfg: the config; its ``default_scope`` says what the model takes,
            unless it is a bare backbone.
        model: Model of that config; it runs to find its modes.
        size: least height and width in pixels; twice or four times that
            where the model needs more.

    Raises:
        SetupError: the model does not run; its own error is in the message.
    """
    able: list[Callable[[nn.Module], Any]] = []
    with torch.no_grad():
        for pixels in (size, 2 * size, 4 * size):
            for way in _ways(cfg, model, pixels):
                try:
                    way(model)
                # Whatever the code of a model may raise.
                except Exception as error:
                    reason = error
                else:
                    able.append(way)
            if able:
                break
        else:
            raise SetupError(
                f'{type(model).__name__} does not run on one random image of '
                f'{size} to {pixels} pixels a side: {first_line(reason)}.'
            ) from reason

    def run(model: nn.Module) -> Any:
        # Some heads draw random numbers as they predict, as SegNeXt's does.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [way(model) for way in able]

    return run


def random_image(
    model: nn.Module, batch: int, height: int, width: int, seed: int = 0
) -> Tensor:
    """An image with the channels that a model takes, or several."""
    from ws_mm.shapes import image_channels

    generator = torch.Generator().manual_seed(seed)
    shape = batch, image_channels(model), height, width
    return torch.randn(shape, generator=generator)


def _ways(
    cfg: Config, model: nn.Module, size: int
) -> list[Callable[[nn.Module], Any]]:
    """List ways to run a model on an image of that size."""
    image = random_image(model, 1, size, size)
    if hasattr(model, 'encode_decode'):
        return [lambda model: segment(model, image)]
    if not isinstance(model, BaseModel) or cfg.get('default_scope') != 'mmdet':
        return [lambda model: model(image)]

    from mmdet.models.mot import BaseMOTModel
    from mmdet.structures import TrackDataSample

    def track(model: Any) -> Any:
        frame = _sample(size)
        frame.set_metainfo(dict(frame_id=0, video_length=1, img_id=0))
        video = TrackDataSample(video_data_samples=[frame])
        return model(image[None], [video], mode='predict')

    def detect(mode: str) -> Callable[[nn.Module], Any]:
        return lambda model: model(image, [_sample(size)], mode=mode)

    if isinstance(model, BaseMOTModel):
        return [track]
    return [detect('tensor'), detect('predict')]


def _sample(size: int) -> Any:
    """Return the data sample of an image with one object, for mmdet."""
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    shape = (size, size)
    sample = DetDataSample(
        metainfo=dict(
            img_shape=shape,
            ori_shape=shape,
            pad_shape=shape,
            batch_input_shape=shape,
            scale_factor=(1.0, 1.0),
        )
    )
    # Some heads assign objects to places before they run.
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[0.0, 0.0, size / 2, size / 2]]),
        labels=torch.tensor([0]),
        masks=BitmapMasks(np.ones((1, *shape), np.uint8), *shape),
    )
    return sample


def segment(model: Any, image: Tensor) -> list[Any]:
    """Run all heads of a segmentor, in the modes that it is in."""
    shape = tuple(image.shape[2:])
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape)
    outputs = [model.encode_decode(image, [meta])]
    # Auxiliary heads only run in training.
    auxiliary = getattr(model, 'auxiliary_head', None)
    if auxiliary is not None:
        features = model.extract_feat(image)
        is_list = isinstance(auxiliary, nn.ModuleList)
        heads = auxiliary if is_list else [auxiliary]
        outputs += [head(features) for head in heads]
    return outputs


def judge(cfg: Config, model: nn.Module, size: int) -> tuple[Any, str]:
    """Check the layers of a config's model.

    Args:
        cfg: the config.
        model: as :func:`build_model` builds it.
        size: height and width in pixels of the image that is run.

    Returns:
        The report of :func:`ws_mm.check`; and a note where the model does
        not run, else ''.
    """
    import ws_mm

    try:
        return ws_mm.check(model, forward_of(cfg, model, size)), ''
    # Whatever a model may raise that wants other inputs.
    except Exception as error:
        return ws_mm.check(model), (
            f'The model does not run on one random image ({error}): judged '
            'by names and order.'
        )


def first_line(error: BaseException) -> str:
    """Class and first line of an error, for the end of a message."""
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0][:300]}'
