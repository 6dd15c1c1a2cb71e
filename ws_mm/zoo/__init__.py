"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .batch_group_norm import BatchGroupNorm
from .batch_instance_norm import BatchInstanceNorm
from .batch_renorm import BatchRenorm
from .bnet import BNET
from .centered_conv import CenteredConv2d
from .cross_iteration_bn import CrossIterationBN
from .iter_norm import IterNorm
from .mabn import MABN
from .online_norm import OnlineNorm
from .output_bn import OutputBN, with_output_bn
from .positional_norm import PositionalNorm
from .sandwich_bn import SandwichBN, set_condition
from .stochastic_whitening_bn import StochasticWhiteningBN
from .switchable_norm import SwitchableNorm

__all__ = [
    'BNET',
    'MABN',
    'BatchGroupNorm',
    'BatchInstanceNorm',
    'BatchRenorm',
    'CenteredConv2d',
    'CrossIterationBN',
    'IterNorm',
    'OnlineNorm',
    'OutputBN',
    'PositionalNorm',
    'SandwichBN',
    'StochasticWhiteningBN',
    'SwitchableNorm',
    'set_condition',
    'with_output_bn',
]
