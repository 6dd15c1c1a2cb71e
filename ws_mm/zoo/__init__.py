"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .adaptive_ws import AdaptiveWSConv2d
from .deformable import WSModulatedDeformConv2d, WSModulatedDeformConv2dPack
from .scaled_ws import ScaledWSConv2d
from .weight_norm import MeanOnlyBN, WNConv2d

__all__ = [
    'AdaptiveWSConv2d',
    'MeanOnlyBN',
    'ScaledWSConv2d',
    'WNConv2d',
    'WSModulatedDeformConv2d',
    'WSModulatedDeformConv2dPack',
]
