"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .adaptive_ws import AdaptiveWSConv2d
from .centered_conv import CenteredConv2d
from .deformable import WSModulatedDeformConv2d, WSModulatedDeformConv2dPack
from .iter_norm import IterNorm
from .mabn import MABN
from .output_bn import OutputBN, with_output_bn
from .scaled_ws import ScaledWSConv2d
from .stochastic_whitening_bn import StochasticWhiteningBN
from .weight_norm import MeanOnlyBN, WNConv2d

__all__ = [
    'MABN',
    'AdaptiveWSConv2d',
    'CenteredConv2d',
    'IterNorm',
    'MeanOnlyBN',
    'OutputBN',
    'ScaledWSConv2d',
    'StochasticWhiteningBN',
    'WNConv2d',
    'WSModulatedDeformConv2d',
    'WSModulatedDeformConv2dPack',
    'with_output_bn',
]
