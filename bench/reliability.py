"""Nothing is lost: kills processes (SIGKILL) while they calibrate and convert, and checks what is left on disk.

    nox -s bench -- reliability.py kill --runs 200

Runs the nodes' own code on a small model, with ComfyUI's own modules, each time in a separate process. Half of the
kills come at uniformly random moments of a run, half within 4 ms of a temporary file appearing. After each kill, every
file under a final name is read in full: a session must load, its layers must agree on its calls and its states must
belong to it; a converted file must be byte for byte that of an undisturbed run, and the next conversion must write it.
Exits with code 1 if anything was damaged or left behind, or if more calls were lost than one save interval.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"  # forked children must not inherit a thread pool

import torch
from crash.calibrating import CALIBRATING, Calibrating
from crash.converting import WAYS, listed, ways
from crash.killing import run
from crash.tally import HEAD, Tally
from rig import pack, tiny
from rig.inprocess import load_comfy, load_model

WORK = [CALIBRATING, *WAYS]


def main() -> None:
    """Print a table row for each kind of work, or an object with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill"])
    parser.add_argument("--runs", type=int, default=200, help="kills while calibrating, and as many while converting")
    parser.add_argument("--work", nargs="*", choices=WORK, default=WORK, help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pack.alias()
    load_comfy()
    logging.disable(logging.INFO)  # ComfyUI logs every file it loads
    if not options.json:
        print(HEAD, flush=True)
    sound = True
    with TemporaryDirectory(prefix="hswq-crash-") as folder:
        rng = random.Random(options.seed)  # noqa: S311 - random moments, not a secret
        for tally in killed(Path(folder), options.work, options.runs, rng):
            print(json.dumps(asdict(tally)) if options.json else "\n".join([tally.row(), *tally.damage]), flush=True)
            sound = sound and tally.sound
    sys.exit(not sound)


def killed(folder: Path, work: list[str], runs: int, rng: random.Random) -> Iterator[Tally]:
    """A tally for each kind of work."""
    import folder_paths

    output = folder / "output"
    folder_paths.set_output_directory(str(output))
    output.mkdir()
    file = listed(tiny.make("flux-tiny"))
    with torch.inference_mode():
        model = load_model(file)
    calibrating = Calibrating(model, output)
    if CALIBRATING in work:
        yield calibrating.killed(runs, rng)
    run(lambda: calibrating.work("whole", 0), calibrating.log)
    for way in ways(model, file, output, "whole"):
        if way.name in work:
            yield way.killed(math.ceil(way.share * runs), rng)


if __name__ == "__main__":
    main()
