"""DGCNN: convolutions over the edges from each point to its neighbours."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.registry import MODELS
from support.checks import SetupError
from support.classifier import Classifier
from torch import Tensor, nn


def edge_features(x: Tensor, k: int) -> Tensor:
    """Each point beside what leads to its k nearest, itself among them.

    Formula, for points i and neighbours j:
        e_ij = [x_i, x_j - x_i]

    Shape:
        x: (B, C, N); result: (B, 2 C, N, k).
    """
    points = x.detach().transpose(1, 2)
    nearest = torch.cdist(points, points).topk(k, largest=False).indices
    index = nearest.flatten(1)[:, None].expand(-1, x.shape[1], -1)
    neighbours = x.gather(2, index).unflatten(2, (-1, k))
    own = x[..., None].expand_as(neighbours)
    return torch.cat([own, neighbours - own], 1)


@MODELS.register_module()
class DGCNN(Classifier):
    """Dynamic graph CNN, https://arxiv.org/abs/1801.07829.

    The neighbours of a layer are nearest in the features of the one before.
    Convolutions are 1x1 ones over (points, neighbours), so that conv_cfg and
    norm_cfg are those of images. Without the paper's input transformer.

    Args:
        num_classes: Classes of the classifier.
        k: neighbours of each point, itself counted.
        channels: of each edge convolution.
        embedding: channels that are pooled over the points.
        hidden: channels of the layers behind the pooling. Their norm has one
            value per channel and cloud: with BN, and one cloud, use ().
        dropout: share of dropped channels in each of them.
        label_smoothing: share of each target spread over all classes.
        conv_cfg: Config of every convolution.
        norm_cfg: Config of every norm.
    """

    def __init__(
        self,
        num_classes: int = 40,
        k: int = 20,
        channels: Sequence[int] = (64, 64, 64, 128),
        embedding: int = 1024,
        hidden: Sequence[int] = (512, 256),
        dropout: float = 0.5,
        label_smoothing: float = 0.0,
        conv_cfg: dict[str, Any] | None = None,
        norm_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        act = {'type': 'LeakyReLU', 'negative_slope': 0.2}
        cfgs = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg, act_cfg=act)
        conv = partial(ConvModule, kernel_size=1, **cfgs)
        self.k, self.label_smoothing = k, label_smoothing
        self.edges = nn.ModuleList(
            conv(2 * inputs, outputs)
            for inputs, outputs in zip((3, *channels), channels, strict=False)
        )
        self.embed = conv(sum(channels), embedding)
        widths = [2 * embedding, *hidden]
        self.hidden = nn.Sequential()
        for inputs, outputs in zip(widths, hidden, strict=False):
            self.hidden.extend([conv(inputs, outputs), nn.Dropout(dropout)])
        self.classifier = nn.Linear(widths[-1], num_classes)

    def scores(self, inputs: Tensor) -> Tensor:
        """Scores of clouds of shape (B, N, 3), at least k points each."""
        if inputs.ndim != 3 or inputs.shape[2] != 3:
            raise SetupError(
                f'DGCNN takes clouds (B, N, 3), not {tuple(inputs.shape)}.'
            )
        if inputs.shape[1] < self.k:
            raise SetupError(
                f'{inputs.shape[1]} points are fewer than k={self.k} '
                'neighbours: lower model.k, or raise num_points of the data.'
            )
        x, found = inputs.transpose(1, 2), []
        for edge in self.edges:
            x = edge(edge_features(x, self.k)).amax(3)
            found.append(x)
        x = self.embed(torch.cat(found, 1)[..., None])
        x = torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)
        return self.classifier(self.hidden(x[..., None, None]).flatten(1))
