"""``merge``: combine sessions of one model recorded on several machines, as if recorded on one."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..calibration.exclusive import alone
from ..calibration.merge import is_taken, merge_files, save_merged, taken
from ..errors import SettingError

log = logging.getLogger("hswq")


def merge(options: argparse.Namespace) -> bool:
    """Write the merged session, and the recorded calls for ``model_aware`` if there are any."""
    output: Path = options.output
    if output.suffix != ".pt":
        raise SettingError("--output", got=output, expected="the name of a new .pt", remedy="Choose another name.")
    if is_taken(output.parent, output.stem):
        raise taken(output)
    merged = merge_files(options.sessions)
    with alone(output):
        save_merged(merged, output)
    log.info("%s", merged.report(str(output)))
    return True
