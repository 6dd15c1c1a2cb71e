"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""

from .batch_group_norm import BatchGroupNorm
from .batch_instance_norm import BatchInstanceNorm
from .bnet import BNET
from .positional_norm import PositionalNorm
from .sandwich_bn import SandwichBN, set_condition
from .switchable_norm import SwitchableNorm

__all__ = [
    'BNET',
    'BatchGroupNorm',
    'BatchInstanceNorm',
    'PositionalNorm',
    'SandwichBN',
    'SwitchableNorm',
    'set_condition',
]
