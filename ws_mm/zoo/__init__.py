"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .adaptive_ws import AdaptiveWSConv2d
from .batch_group_norm import BatchGroupNorm
from .batch_instance_norm import BatchInstanceNorm
from .batch_renorm import BatchRenorm
from .bnet import BNET
from .centered_conv import CenteredConv2d
from .cross_iteration_bn import CrossIterationBN
from .deformable import WSModulatedDeformConv2d, WSModulatedDeformConv2dPack
from .evonorm import EvoNormB0, EvoNormS0
from .frn import FRN
from .group_norm1 import GroupNorm1
from .iter_norm import IterNorm
from .mabn import MABN
from .online_norm import OnlineNorm
from .output_bn import OutputBN, with_output_bn
from .positional_norm import PositionalNorm
from .sandwich_bn import SandwichBN, set_condition
from .scaled_ws import ScaledWSConv2d
from .stochastic_whitening_bn import StochasticWhiteningBN
from .switchable_norm import SwitchableNorm
from .weight_norm import MeanOnlyBN, WNConv2d

__all__ = [
    'BNET',
    'FRN',
    'MABN',
    'AdaptiveWSConv2d',
    'BatchGroupNorm',
    'BatchInstanceNorm',
    'BatchRenorm',
    'CenteredConv2d',
    'CrossIterationBN',
    'EvoNormB0',
    'EvoNormS0',
    'GroupNorm1',
    'IterNorm',
    'MeanOnlyBN',
    'OnlineNorm',
    'OutputBN',
    'PositionalNorm',
    'SandwichBN',
    'ScaledWSConv2d',
    'StochasticWhiteningBN',
    'SwitchableNorm',
    'WNConv2d',
    'WSModulatedDeformConv2d',
    'WSModulatedDeformConv2dPack',
    'set_condition',
    'with_output_bn',
]
