"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .centered_conv import CenteredConv2d
from .mabn import MABN

__all__ = ['MABN', 'CenteredConv2d']
