"""Small networks that mislead, or that run any layers."""

import torch
import torch.nn.functional as F
from torch import nn

from ws_mm import BCN, WSConv2d

IMAGE = (2, 3, 12, 12)


class Net(nn.Module):
    """Misleading on purpose: bn1 and bn2 are run in the other order."""

    def __init__(self, conv=WSConv2d, norm=lambda c: BCN(c, 4)):
        super().__init__()
        self.conv1 = conv(3, 8, 3, bias=True, padding=1)
        self.bn1 = norm(8)
        self.conv2 = conv(8, 8, 3, groups=2, padding_mode='reflect', padding=1)
        self.bn2 = norm(8)
        self.logits = nn.Conv2d(8, 2, 1)
        self.auxiliary = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.bn2(self.conv1(x)))
        return self.logits(F.relu(self.bn1(self.conv2(x))))


class Run(nn.Module):
    """Any layers, run by any function of them and the image."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.run(self, x)


def randomize(model):
    for name, values in model.state_dict().items():
        if values.is_floating_point():
            values.copy_(torch.randn(values.shape))
            if name.endswith('running_var'):
                values.copy_(torch.rand(values.shape) + 0.2)
    return model


def image(dtype=torch.float32):
    return torch.randn(IMAGE, dtype=dtype)


def layers(**more):
    return dict(conv=WSConv2d(3, 8, 1), bn=BCN(8, 4), **more)
