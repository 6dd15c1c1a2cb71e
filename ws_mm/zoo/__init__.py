"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .batch_renorm import BatchRenorm
from .cross_iteration_bn import CrossIterationBN
from .online_norm import OnlineNorm

__all__ = ['BatchRenorm', 'CrossIterationBN', 'OnlineNorm']
