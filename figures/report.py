"""Pictures of reports, drawn by matplotlib, which takes a second to import and is imported for the first one."""

from __future__ import annotations

import importlib

import torch

from ..hswq_core.errors import SettingError
from ..hswq_core.reports.file import FileReport
from ..hswq_core.reports.session import SessionReport


def picture_of(report: FileReport | SessionReport) -> torch.Tensor:
    """The picture of a report, float32 [1, 1200, 1600, 3] in [0, 1].

    Raises:
        SettingError: matplotlib is not installed.
    """
    try:
        for needed in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
            importlib.import_module(needed)
    except ImportError as error:
        raise SettingError(
            "HSWQ Report, picture",
            got=f"a Python without matplotlib ({error})",
            expected="matplotlib, which draws it",
            remedy="Run `python -m pip install -r requirements.txt` in this pack's folder, with ComfyUI's own Python.",
        ) from error
    theme = importlib.import_module(".theme", __package__)
    kind = ".file_figure" if isinstance(report, FileReport) else ".session_figure"
    drawn: torch.Tensor = theme.to_image(importlib.import_module(kind, __package__).figure_of(report))
    return drawn
