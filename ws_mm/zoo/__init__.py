"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .iter_norm import IterNorm
from .stochastic_whitening_bn import StochasticWhiteningBN

__all__ = ['IterNorm', 'StochasticWhiteningBN']
