"""Modules that several tools share.

With it ``ws_mm`` of the checkout can be imported where none is installed.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if importlib.util.find_spec('ws_mm') is None:
    sys.path.insert(0, str(ROOT))
