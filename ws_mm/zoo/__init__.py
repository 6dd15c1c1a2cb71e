"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .evonorm import EvoNormB0, EvoNormS0
from .frn import FRN
from .group_norm1 import GroupNorm1

__all__ = ['FRN', 'EvoNormB0', 'EvoNormS0', 'GroupNorm1']
