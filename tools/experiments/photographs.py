"""What the segmentation of photographs needs beside mmseg."""

from typing import Any, ClassVar

from mmcv.cnn import ConvModule
from mmengine.registry import DATASETS, MODELS
from mmseg.datasets import BaseSegDataset, PascalVOCDataset
from mmseg.models.decode_heads import ASPPHead


@DATASETS.register_module()
class VOCFolders(BaseSegDataset):
    """VOC in folders, without a list; classes left out are ignored."""

    METAINFO: ClassVar = PascalVOCDataset.METAINFO


@MODELS.register_module()
class LiteASPPHead(ASPPHead):
    """DeepLabV3's head whose pooled branch is a plain convolution.

    One image leaves that branch one value per channel, which no batch norm
    can take: in this head every norm can be trained on one image. The Lite
    head of MobileNetV3 has no norm there, either.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_pool[1] = ConvModule(
            self.in_channels, self.channels, 1, act_cfg=self.act_cfg
        )
