"""Nothing lost: processes killed (SIGKILL) while they calibrate and convert, and what is on disk behind them.

    nox -s bench -- reliability.py kill --runs 200

The nodes' own code on a small model, in ComfyUI's own modules, each time in a process of its own. Half of the kills
come at uniformly random moments of a run, half within 4 ms of the sight of a temporary file. After each kill every
file under a final name is read whole: a session must load, its layers agree on its calls and its states belong to it; a
converted file must be, byte for byte, that of an undisturbed run, and the next conversion must write it. Ends with
exit code 1 if anything was damaged, left behind, or more calls lost than one interval of saving.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"  # forked children must find no pool of threads

import torch
from crash.calibrating import Calibrating
from crash.converting import listed, ways
from crash.killing import run
from crash.tally import HEAD, Tally
from rig import pack, tiny
from rig.inprocess import load_comfy, load_model


def main() -> None:
    """A table, or with --json a list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill"])
    parser.add_argument("--runs", type=int, default=200, help="kills while calibrating, and as many while converting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pack.alias()
    load_comfy()
    logging.disable(logging.INFO)  # ComfyUI tells of every file it loads
    with TemporaryDirectory(prefix="hswq-crash-") as folder:
        tallies = killed(Path(folder), options.runs, random.Random(options.seed))  # noqa: S311 - moments, no secret
    if options.json:
        print(json.dumps([asdict(tally) for tally in tallies]))
    else:
        print("\n".join([HEAD, *(tally.row() for tally in tallies)]))
        for tally in tallies:
            print("\n".join(f"{tally.name}: {line}" for line in tally.damage), end="")
    sys.exit(not all(tally.sound for tally in tallies))


def killed(folder: Path, runs: int, rng: random.Random) -> list[Tally]:
    """One tally for calibrating, three for converting."""
    import folder_paths

    output = folder / "output"
    folder_paths.set_output_directory(str(output))
    output.mkdir()
    file = listed(tiny.make("flux-tiny"))
    with torch.inference_mode():
        model = load_model(file)
    calibrating = Calibrating(model, output)
    tallies = [calibrating.killed(runs, rng)]
    run(lambda: calibrating.work("whole", 0), calibrating.log)
    three = ways(model, file, output, "whole")
    return tallies + [way.killed(math.ceil(way.share * runs), rng) for way in three]


if __name__ == "__main__":
    main()
