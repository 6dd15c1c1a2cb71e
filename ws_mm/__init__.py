"""Weight Standardization and Batch-Channel Normalization for OpenMMLab.

Importing this package registers its layers in mmengine's root registry,
so that ``type='ws_mm.BCN'`` works in every config and ``type='BCN'`` with
``custom_imports``. It needs torch and mmengine, which needs OpenCV.
"""

from importlib import metadata

# compat first: it names a version that does not fit, before anything fails.
from . import (
    compat,  # noqa: F401
    zoo,
)
from .baking import bake
from .checking import check
from .checkpoint import PretrainedGN
from .configs import apply_norm
from .conv import (
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose1d,
    WSConvTranspose2d,
    WSConvTranspose3d,
)
from .conversion import convert
from .estimates import update_estimates
from .estimates_hook import UpdateEstimatesHook
from .functional import batch_channel_norm, standardize_weight
from .hooks import CheckModelHook, SyncEstimatesHook, sync_estimates
from .norm import BCN
from .resume import ExactResumeHook
from .singularities import SingularitiesHook

try:
    __version__ = metadata.version('ws-mm')
except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = 'unknown'

__all__ = [
    'BCN',
    'CheckModelHook',
    'ExactResumeHook',
    'PretrainedGN',
    'SingularitiesHook',
    'SyncEstimatesHook',
    'UpdateEstimatesHook',
    'WSConv1d',
    'WSConv2d',
    'WSConv3d',
    'WSConvTranspose1d',
    'WSConvTranspose2d',
    'WSConvTranspose3d',
    '__version__',
    'apply_norm',
    'bake',
    'batch_channel_norm',
    'check',
    'convert',
    'standardize_weight',
    'sync_estimates',
    'update_estimates',
    'zoo',
]
