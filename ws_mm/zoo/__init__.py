"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .adaptive_ws import AdaptiveWSConv2d as AdaptiveWSConv2d
from .batch_group_norm import BatchGroupNorm as BatchGroupNorm
from .batch_instance_norm import BatchInstanceNorm as BatchInstanceNorm
from .batch_renorm import BatchRenorm as BatchRenorm
from .bnet import BNET as BNET
from .centered_conv import CenteredConv2d as CenteredConv2d
from .cross_iteration_bn import CrossIterationBN as CrossIterationBN
from .deformable import WSModulatedDeformConv2d as WSModulatedDeformConv2d
from .deformable import (
    WSModulatedDeformConv2dPack as WSModulatedDeformConv2dPack,
)
from .eased_bcn import EasedBCN as EasedBCN
from .evonorm import EvoNormB0 as EvoNormB0
from .evonorm import EvoNormS0 as EvoNormS0
from .frn import FRN as FRN
from .group_norm1 import GroupNorm1 as GroupNorm1
from .iter_norm import IterNorm as IterNorm
from .mabn import MABN as MABN
from .online_norm import OnlineNorm as OnlineNorm
from .output_bn import OutputBN as OutputBN
from .output_bn import with_output_bn as with_output_bn
from .positional_norm import PositionalNorm as PositionalNorm
from .sandwich_bn import SandwichBN as SandwichBN
from .sandwich_bn import set_condition as set_condition
from .scaled_ws import ScaledWSConv2d as ScaledWSConv2d
from .stochastic_whitening_bn import (
    StochasticWhiteningBN as StochasticWhiteningBN,
)
from .switchable_norm import SwitchableNorm as SwitchableNorm
from .weight_norm import MeanOnlyBN as MeanOnlyBN
from .weight_norm import WNConv2d as WNConv2d
