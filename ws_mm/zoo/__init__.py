"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .centered_conv import CenteredConv2d
from .iter_norm import IterNorm
from .mabn import MABN
from .output_bn import OutputBN, with_output_bn
from .stochastic_whitening_bn import StochasticWhiteningBN

__all__ = [
    'MABN',
    'CenteredConv2d',
    'IterNorm',
    'OutputBN',
    'StochasticWhiteningBN',
    'with_output_bn',
]
