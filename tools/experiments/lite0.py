"""EfficientNet-Lite0 as a backbone for mmdet and mmseg, with any norm."""

from typing import Any

from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from ws_mm.functional import largest_group_count

# Of each stage: kernel, stride, times wider inside, channels, blocks.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM = 32
OUTPUTS = (1, 2, 4, 6)  # stages: strides 4, 8, 16, 32
EPS = 1e-3  # of the published network
Config = dict[str, Any] | None


class Layer(nn.Module):
    """Convolution, norm and ReLU6.

    Convention: padding is TensorFlow's 'SAME', outside of the convolution,
        so that any ``conv_cfg`` can be used. A norm without ``eps`` gets
        that of the network. Where ``num_groups`` does not divide the
        channels, or leaves one to a group, it is the next smaller one that
        does neither.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        conv_cfg: Config,
        norm_cfg: dict[str, Any],
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        norm_cfg = {'eps': EPS, **norm_cfg}
        if 'num_groups' in norm_cfg:
            asked = norm_cfg['num_groups']
            norm_cfg['num_groups'] = largest_group_count(outputs, asked)
        self.kernel, self.stride, self.act = kernel, stride, act
        self.conv = build_conv_layer(
            conv_cfg,
            *(inputs, outputs, kernel, stride),
            groups=groups,
            bias=False,
        )
        self.norm = build_norm_layer(norm_cfg, outputs)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve ``x``, normalize and activate."""
        padding: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            reach = (-(-size // self.stride) - 1) * self.stride + self.kernel
            missing = max(reach - size, 0)
            padding += missing // 2, missing - missing // 2
        x = self.norm(self.conv(F.pad(x, padding)))
        return F.relu6(x) if self.act else x


class Block(nn.Module):
    """Pointwise, depthwise and pointwise layer, and the shortcut."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        wider: int,
        conv_cfg: Config,
        norm_cfg: dict[str, Any],
        depthwise: bool,
    ) -> None:
        super().__init__()
        inner = wider * inputs
        if wider > 1:
            self.expand = Layer(inputs, inner, 1, conv_cfg, norm_cfg)
        self.depthwise = Layer(
            *(inner, inner, kernel, conv_cfg if depthwise else None),
            *(norm_cfg, stride, inner),
        )
        self.project = Layer(inner, outputs, 1, conv_cfg, norm_cfg, act=False)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layers, added to ``x`` where it fits."""
        y = self.expand(x) if hasattr(self, 'expand') else x
        y = self.project(self.depthwise(y))
        return x + y if self.shortcut else y


@MODELS.register_module()
class Lite0(BaseModule):
    """EfficientNet-Lite0 without its classifier.

    Shape: (N, 3, H, W) to four maps of 24, 40, 112 and 320 channels, at
        strides 4, 8, 16 and 32.

    Args:
        conv_cfg: convolutions; those of one channel each stay plain.
        norm_cfg: norms.
        depthwise: whether ``conv_cfg`` is for those of one channel, too. A
            filter of 9 or 25 values that blurs, as many of them do, has its
            meaning in the mean that standardization takes away.
        norm_eval: whether batch norms keep their statistics in training.
        init_cfg: initial weights; He's by default.

    Source: arXiv 1905.11946; the Lite form, without squeeze-and-excitation
        and with ReLU6, is of github.com/tensorflow/tpu.
    """

    def __init__(
        self,
        conv_cfg: Config = None,
        norm_cfg: Config = None,
        depthwise: bool = False,
        norm_eval: bool = False,
        init_cfg: Any = None,
    ) -> None:
        he = dict(type='Kaiming', layer='Conv2d', mode='fan_in')
        super().__init__(init_cfg or he)
        norm_cfg = norm_cfg or dict(type='BN')
        self.norm_eval = norm_eval
        self.stem = Layer(3, STEM, 3, conv_cfg, norm_cfg, stride=2)
        self.blocks = nn.ModuleList()
        self.ends: list[int] = []  # numbers of blocks, for each stage
        inputs = STEM
        for kernel, stride, wider, channels, number in STAGES:
            for i in range(number):
                self.blocks.append(
                    Block(
                        *(inputs, channels, kernel, stride if i == 0 else 1),
                        *(wider, conv_cfg, norm_cfg, depthwise),
                    )
                )
                inputs = channels
            self.ends.append(len(self.blocks) - 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of four strides."""
        wanted = [self.ends[stage] for stage in OUTPUTS]
        x, found = self.stem(x), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in wanted:
                found.append(x)
        return tuple(found)

    def train(self, mode: bool = True) -> 'Lite0':
        """Keep batch norms in eval mode with ``norm_eval``."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self
