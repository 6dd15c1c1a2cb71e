"""What the segmentation of photographs needs beside mmseg."""

from typing import Any, ClassVar

from mmcv.cnn import ConvModule
from mmengine.registry import DATASETS, MODELS
from mmseg.datasets import BaseSegDataset, PascalVOCDataset
from mmseg.models.decode_heads import ASPPHead
from torch import nn


@DATASETS.register_module()
class VOCFolders(BaseSegDataset):
    """VOC in folders, without a list; classes left out are ignored."""

    METAINFO: ClassVar = PascalVOCDataset.METAINFO


@MODELS.register_module()
class LiteASPPHead(ASPPHead):
    """DeepLabV3's head whose pooled branch is the same for every norm.

    One image leaves that branch one value per channel, which no batch norm
    can take. Here the pooled features are normalized over their channels,
    and a plain convolution follows: every norm can be trained on one image.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.GroupNorm(1, self.in_channels, affine=False),
            ConvModule(
                self.in_channels, self.channels, 1, act_cfg=self.act_cfg
            ),
        )
