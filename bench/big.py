"""Minutes and memory of `model_aware` on full-size models with random weights: not quality, only whether it finishes.

    nox -s bench -- big.py --model sdxl --latent 64

Models: the whole SDXL UNet (2.57 G parameters), and Flux at its real width with few blocks. On a GPU, ComfyUI's own
--reserve-vram simulates a smaller card: `--device cuda --reserve 12`.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rig import inprocess, pack, tiny
from tqdm import tqdm

MODELS = {
    "sdxl": ("sdxl", {}, (77, 77)),
    "sdxl-small": ("sdxl-small", {}, (77, 77)),
    "flux": ("flux-tiny", {"hidden": 3072, "double": 1, "single": 2, "txt_dim": 4096}, (256, 256)),
}
WIDTHS = {"sdxl": (2048, 1280), "sdxl-small": (2048, 1280), "flux": (4096, 768)}


@dataclass
class Clock:
    """Seconds of each stage of a conversion."""

    bar: tqdm[None]
    seconds: dict[str, float] = field(default_factory=dict)
    stage: str = "Opening"
    since: float = field(default_factory=time.perf_counter)

    def __call__(self, step: Any, done: int, total: int) -> None:
        """Progress callback of the converter."""
        self.lap(step.stage)
        self.bar.set_description_str(f"{step} ({done}/{total})")

    def lap(self, stage: str) -> None:
        """End the current stage and start the next."""
        now = time.perf_counter()
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self.since
        self.stage, self.since = stage, now


def main() -> None:
    """Calibrate, convert, print a table of stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="sdxl")
    parser.add_argument("--latent", type=int, default=64, help="side of the latent: 64 is a picture of 512 x 512")
    parser.add_argument("--pictures", type=int, default=12, help="that calibrate, each of its own prompt")
    parser.add_argument("--steps", type=int, default=2, help="of each")
    parser.add_argument("--states", type=int, default=16, help="model calls to keep")
    parser.add_argument("--format", default="v2")
    parser.add_argument("--percent", type=float, default=3.0, help="extra bytes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--reserve", type=float, default=0.0, help="GB of VRAM that ComfyUI leaves alone")
    parser.add_argument(
        "--folder", type=Path, help="keep session and work here; another run goes on where this stopped"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    switches = ["--reserve-vram", str(options.reserve)] if options.reserve else []
    switches += ["--base-directory", str(options.folder.resolve())] if options.folder else []
    inprocess.load_comfy(switches, cpu=options.device == "cpu")
    pack.alias()
    print(table(measured(options), options))


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Seconds by stage."""
    from hswq.loader.calibration.model import calibrated
    from hswq.loader.convert.model import Request, convert_model
    from hswq.loader.sessions.store import path_of

    kind, settings, tokens = MODELS[options.model]
    with torch.inference_mode(), tqdm(bar_format="{elapsed} {desc}", dynamic_ncols=True) as bar:
        clock = Clock(bar, stage="Loading")
        model = inprocess.load_model(tiny.make(kind, **settings))
        clock.lap("Calibrating")
        bar.set_description_str("Calibrating")
        watched = calibrated(model, path_of("big"), 1000, lambda _line: None, states=options.states)
        size = {"steps": options.steps, "size": options.latent, "tokens": tokens, "widths": WIDTHS[options.model]}
        for prompt in range(drawn(path_of("big")), options.pictures):
            inprocess.sample(watched, prompt=prompt, **size)
        clock.lap("Opening")
        request = Request("big", options.format, extra_percent=options.percent)
        done = convert_model(model, None, None, request, clock)
        clock.lap("end")
    print(done.report)
    done.path.unlink()
    return clock.seconds


def drawn(session: Path) -> int:
    """Number of pictures that an earlier run calibrated with."""
    from hswq.hswq_core.calibration.session import load_session

    return load_session(session).images if session.exists() else 0


def table(seconds: dict[str, float], options: argparse.Namespace) -> str:
    """Markdown."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    calibration = f"{options.pictures} pictures of {options.steps} steps, {options.states} states"
    lines = [
        f"| {options.model}, {options.latent} x {options.latent} latents, {calibration} | minutes |",
        "|---|--:|",
    ]
    lines += [f"| {stage} | {spent / 60:.1f} |" for stage, spent in seconds.items()]
    lines += [f"| all | {sum(seconds.values()) / 60:.1f} |", f"| peak of RAM | {peak:.1f} GB |"]
    if options.device == "cuda":
        lines.append(f"| peak of VRAM | {torch.cuda.max_memory_allocated() / 2**30:.1f} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
