"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .iter_norm import IterNorm
from .output_bn import OutputBN, with_output_bn
from .stochastic_whitening_bn import StochasticWhiteningBN

__all__ = ['IterNorm', 'OutputBN', 'StochasticWhiteningBN', 'with_output_bn']
