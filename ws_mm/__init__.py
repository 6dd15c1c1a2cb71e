"""Weight Standardization and Batch-Channel Normalization for OpenMMLab.

Importing this package registers its layers in mmengine's root registry,
so that ``type='ws_mm.BCN'`` works in every config and ``type='BCN'`` with
``custom_imports``. It needs torch and mmengine, nothing else.
"""

try:
    import mmengine  # noqa: F401
except ImportError as error:
    raise ImportError(
        'ws_mm registers its layers with mmengine, which cannot be imported '
        f"({error}). Install it with: pip install 'onedl-mmengine>=0.10.12'"
    ) from error

from .checkpoint import PretrainedGN
from .configs import apply_norm
from .conv import WSConv1d, WSConv2d, WSConv3d
from .functional import batch_channel_norm, standardize_weight
from .hooks import CheckModelHook, SyncEstimatesHook
from .norm import BCN
from .resume import ExactResumeHook
from .singularities import SingularitiesHook
from .surgery import bake, check, convert
from .update_rate import UpdateRateHook

__version__ = '0.1.0'

__all__ = [
    'BCN',
    'CheckModelHook',
    'ExactResumeHook',
    'PretrainedGN',
    'SingularitiesHook',
    'SyncEstimatesHook',
    'UpdateRateHook',
    'WSConv1d',
    'WSConv2d',
    'WSConv3d',
    '__version__',
    'apply_norm',
    'bake',
    'batch_channel_norm',
    'check',
    'convert',
    'standardize_weight',
]
