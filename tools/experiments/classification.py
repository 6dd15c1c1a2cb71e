"""Classification for experiments: folders of images, ResNet and VGG.

mmdet and mmseg have no classifier; this is as much of one as the
experiments need, on mmengine and with the builders of mmcv.
"""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch.nn.functional as F
from experiments.contrast import by_contrast
from mmcv.cnn import ConvModule
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
Config = dict[str, Any] | None


@DATASETS.register_module()
class ClassFolders(ImageFolder):
    """Images in one folder for each class, 32 pixels wide.

    Args:
        data_root: Parent of the folders.
        augment: shift by up to 4 pixels and mirror.
    """

    metainfo: dict[str, Any]

    def __init__(self, data_root: str, augment: bool = False) -> None:
        steps: list[Any] = []
        if augment:
            steps += [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
            ]
        steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        super().__init__(data_root, transforms.Compose(steps))
        self.metainfo = {'classes': tuple(self.classes)}


def conv(
    inputs: int,
    outputs: int,
    conv_cfg: Config,
    norm_cfg: Config,
    act: bool = True,
    **kwargs: Any,
) -> ConvModule:
    """A 3x3 convolution, its norm and its ReLU."""
    return ConvModule(
        inputs,
        outputs,
        **{'kernel_size': 3, 'padding': 1, **kwargs},
        conv_cfg=conv_cfg,
        norm_cfg=norm_cfg,
        act_cfg={'type': 'ReLU'} if act else None,
    )


class Block(nn.Module):
    """Two convolutions around which the input goes."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, *cfgs: Config
    ) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, *cfgs, stride=stride)
        self.conv2 = conv(outputs, outputs, *cfgs, act=False)
        self.downsample = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else conv(
                inputs,
                outputs,
                *cfgs,
                act=False,
                kernel_size=1,
                padding=0,
                stride=stride,
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolutions make of x to x."""
        return F.relu(self.conv2(self.conv1(x)) + self.downsample(x))


class Classifier(BaseModel):
    """Features, their mean over the image, and a linear layer.

    Args:
        layers: Layers of the features, in their order.
        channels: Channels of the last layer.
        num_classes: Classes of the classifier.
        standardize: give every image zero mean and unit variance first.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        channels: int,
        num_classes: int,
        standardize: bool,
    ) -> None:
        super().__init__()
        self.standardize = standardize
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(
        self, inputs: Tensor, labels: Tensor, mode: str = 'tensor'
    ) -> Any:
        """Scores, their loss, or what the metric compares."""
        contrast = inputs.std((1, 2, 3))
        if self.standardize:
            inputs = F.layer_norm(inputs, inputs.shape[1:])
        scores = self.classifier(self.features(inputs).mean((2, 3)))
        if mode == 'loss':
            return {'loss': F.cross_entropy(scores, labels)}
        if mode == 'predict':
            right = (scores.argmax(1) == labels).tolist()
            return [
                {'right': hit, 'contrast': value}
                for hit, value in zip(right, contrast.tolist(), strict=True)
            ]
        return scores


@MODELS.register_module()
class CifarResNet(Classifier):
    """The ResNet of 6 n + 2 layers for images of 32 pixels.

    Args:
        blocks: n, blocks in each of the three stages.
        width: channels of the first stage, doubled in each of the others.
        num_classes: Classes of the classifier.
        conv_cfg: Config of every convolution.
        norm_cfg: Config of every norm.
        standardize: give every image zero mean and unit variance first.
    """

    def __init__(
        self,
        blocks: int = 1,
        width: int = 32,
        num_classes: int = 10,
        conv_cfg: Config = None,
        norm_cfg: Config = None,
        standardize: bool = False,
    ) -> None:
        cfgs = conv_cfg, norm_cfg
        layers: list[nn.Module] = [conv(3, width, *cfgs)]
        channels = width
        for stage in range(3):
            for block in range(blocks):
                outputs = width * 2**stage
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Block(channels, outputs, stride, *cfgs))
                channels = outputs
        super().__init__(layers, channels, num_classes, standardize)


@MODELS.register_module()
class CifarVGG(Classifier):
    """VGG for images of 32 pixels: stages of convolutions, no way around.

    Args:
        stages: convolutions in each stage; a 2x2 max pooling ends it.
        width: channels of the first stage, doubled up to eight times it.
        num_classes: Classes of the classifier.
        conv_cfg: Config of every convolution.
        norm_cfg: Config of every norm.
        standardize: give every image zero mean and unit variance first.
    """

    def __init__(
        self,
        stages: Sequence[int] = (1, 1, 2, 2),
        width: int = 32,
        num_classes: int = 10,
        conv_cfg: Config = None,
        norm_cfg: Config = None,
        standardize: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for stage, convs in enumerate(stages):
            outputs = width * min(2**stage, 8)
            for _ in range(convs):
                layers.append(conv(channels, outputs, conv_cfg, norm_cfg))
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        super().__init__(layers, channels, num_classes, standardize)


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Share of images whose highest score is that of their class."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Keep whether each prediction of a batch is right."""
        self.results += [
            (sample['right'], sample['contrast']) for sample in data_samples
        ]

    def compute_metrics(
        self, results: list[tuple[bool, float]]
    ) -> dict[str, float]:
        """The share, in percent: of all, and by thirds of contrast."""
        right = [100.0 * hit for hit, _ in results]
        thirds = by_contrast(right, [value for _, value in results])
        return {'accuracy': mean(right), **thirds}
