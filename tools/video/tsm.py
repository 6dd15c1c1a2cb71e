"""TSM: a ResNet on frames whose residual blocks see the frames beside."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from support.checks import SetupError
from support.classifier import Classifier
from torch import Tensor, nn


def shift(x: Tensor, frames: int) -> Tensor:
    """Move some channels of each clip by one frame.

    Formula, for frame t, C channels, f = C // 8, and 0 beyond the clip:
        y[t, :f] = x[t + 1, :f]
        y[t, f:2 f] = x[t - 1, f:2 f]
        y[t, 2 f:] = x[t, 2 f:]

    Shape:
        x, result: (clips * frames, C, H, W).
    """
    clips, f = x.unflatten(0, (-1, frames)), x.shape[1] // 8
    next_ones = F.pad(clips[:, 1:, :f], (0, 0) * 3 + (0, 1))
    last_ones = F.pad(clips[:, :-1, f : 2 * f], (0, 0) * 3 + (1, 0))
    return torch.cat([next_ones, last_ones, clips[:, :, 2 * f :]], 2).flatten(
        0, 1
    )


def shifted(frames: int, conv: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """As a hook before a convolution."""
    return shift(inputs[0], frames)


@MODELS.register_module()
class TSM(Classifier):
    """Temporal shift module, https://arxiv.org/abs/1811.08383.

    The first convolution of every residual block gets shifted channels. The
    backbone keeps the names of its weights, so that those of images load.

    Args:
        backbone: Config of a ResNet of the default scope.
        channels: of its last stage.
        num_classes: Classes of the classifier.
        frames: of each clip.
        dropout: share of dropped channels before the classifier.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        channels: int,
        num_classes: int,
        frames: int = 8,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.frames = frames
        self.backbone = MODELS.build(backbone)
        if not hasattr(self.backbone, 'res_layers'):
            raise SetupError(
                f'model.backbone: {type(self.backbone).__name__} has no '
                'residual blocks to shift channels in: use a ResNet.'
            )
        for stage in self.backbone.res_layers:
            for block in getattr(self.backbone, stage):
                block.conv1.register_forward_pre_hook(partial(shifted, frames))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)

    def scores(self, inputs: Tensor) -> Tensor:
        """Mean of the frames' scores, of clips (B, frames, 3, H, W)."""
        if inputs.ndim != 5 or inputs.shape[1:3] != (self.frames, 3):
            raise SetupError(
                f'TSM takes clips (B, {self.frames}, 3, H, W), not '
                f'{tuple(inputs.shape)}: model.frames and frames of the data '
                'must agree.'
            )
        x = self.backbone(inputs.flatten(0, 1))[-1].mean((2, 3))
        scores = self.classifier(self.dropout(x))
        return scores.unflatten(0, (-1, self.frames)).mean(1)
