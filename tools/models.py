"""Build the model of a config and run it once; write what belongs together."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checks import BUILD_ERRORS, SetupError, explain
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model in eval mode, without pretrained weights.

    Raises:
        SetupError: it cannot be built.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    try:
        model = MODELS.build(cfg.model)
    except BUILD_ERRORS as error:
        raise SetupError(
            f'The model of the config cannot be built: {error}'
            f'{explain(cfg, error)}'
        ) from error
    # mmdet's backbones return None from it.
    model.eval()
    return model


def forward_of(cfg: Config, size: int = 64) -> Callable[[nn.Module], Any]:
    """Make a function that runs all of a model on one random image.

    Args:
        cfg: the config; its ``default_scope`` says what the model takes,
            unless it is a bare backbone.
        size: height and width in pixels.
    """
    image = torch.randn(
        1, 3, size, size, generator=torch.Generator().manual_seed(0)
    )

    def run(model: nn.Module) -> Any:
        with torch.no_grad():
            if not hasattr(model, 'backbone'):
                return model(image)
            if cfg.get('default_scope') == 'mmdet':
                from mmdet.structures import DetDataSample

                shape = (size, size)
                meta = dict(
                    img_shape=shape,
                    ori_shape=shape,
                    pad_shape=shape,
                    batch_input_shape=shape,
                    scale_factor=(1.0, 1.0),
                )
                sample = DetDataSample(metainfo=meta)
                return model(image, [sample], mode='tensor')
            if cfg.get('default_scope') == 'mmseg':
                features = model.extract_feat(image)
                heads = [model.decode_head]
                # Auxiliary heads only run in training.
                auxiliary = getattr(model, 'auxiliary_head', None) or []
                is_list = isinstance(auxiliary, nn.ModuleList)
                heads += auxiliary if is_list or not auxiliary else [auxiliary]
                return [head(features) for head in heads]
            return model(image)

    return run


def write_together(
    folder: str | Path, writers: dict[str, Callable[[str], Any]]
) -> list[Path]:
    """Write several files, all of them or none.

    Args:
        folder: where they go; made if missing.
        writers: for each file name, what writes it to a given path.

    Returns:
        The paths written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.writing-') as new:
        for name, write in writers.items():
            write(os.path.join(new, name))
        for name in writers:
            os.replace(os.path.join(new, name), folder / name)
    return [folder / name for name in writers]
