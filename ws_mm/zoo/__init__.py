"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .batch_renorm import BatchRenorm
from .centered_conv import CenteredConv2d
from .cross_iteration_bn import CrossIterationBN
from .iter_norm import IterNorm
from .mabn import MABN
from .online_norm import OnlineNorm
from .output_bn import OutputBN, with_output_bn
from .stochastic_whitening_bn import StochasticWhiteningBN

__all__ = [
    'MABN',
    'BatchRenorm',
    'CenteredConv2d',
    'CrossIterationBN',
    'IterNorm',
    'OnlineNorm',
    'OutputBN',
    'StochasticWhiteningBN',
    'with_output_bn',
]
