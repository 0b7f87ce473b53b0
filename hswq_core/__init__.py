"""HSWQ's mathematics and file formats: torch, safetensors and the standard library (its command line: tqdm too).

Imports no ComfyUI.
"""

from .checkpoint import FileSource, TensorInfo, TensorSource, read_header, readable
from .convert import Conversion, report, source_layers, write_plan
from .errors import FileError, HSWQError, LayerError, SessionError, SettingError
from .exclusions import Exclusions
from .families import FAMILIES, GENERIC, Family, detect_family, family_named
from .fingerprint import Fingerprint, layout_hash, sample_weights
from .formats import FORMATS, FileFormat, format_named
from .grid import FLOAT8_DTYPES, FLOAT8_E4M3FN, GRIDS, Grid
from .header import declared_format
from .hswq import plan_hswq
from .nearest import plan_nearest
from .observer import LAYER_KINDS, LayerObserver, LayerStats
from .plan import KEEP, QUANTIZE, SKIP, Layer, LayerPlan, Plan, Progress, no_progress
from .search import search_amax
from .session import Session, load_session, save_session
from .tensor_header import read_records

__all__ = [
    "FAMILIES",
    "FLOAT8_DTYPES",
    "FLOAT8_E4M3FN",
    "FORMATS",
    "GENERIC",
    "GRIDS",
    "KEEP",
    "LAYER_KINDS",
    "QUANTIZE",
    "SKIP",
    "Conversion",
    "Exclusions",
    "Family",
    "FileError",
    "FileFormat",
    "FileSource",
    "Fingerprint",
    "Grid",
    "HSWQError",
    "Layer",
    "LayerError",
    "LayerObserver",
    "LayerPlan",
    "LayerStats",
    "Plan",
    "Progress",
    "Session",
    "SessionError",
    "SettingError",
    "TensorInfo",
    "TensorSource",
    "declared_format",
    "detect_family",
    "family_named",
    "format_named",
    "layout_hash",
    "load_session",
    "no_progress",
    "plan_hswq",
    "plan_nearest",
    "read_header",
    "read_records",
    "readable",
    "report",
    "sample_weights",
    "save_session",
    "search_amax",
    "source_layers",
    "write_plan",
]
