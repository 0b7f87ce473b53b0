"""Feeds the readers hostile input, guided by coverage, and reports the findings (Linux).

    nox -s fuzz -- session --runs 1000000

Every input must be accepted, or refused with one of this pack's errors, within a second of CPU time and 1 GB of memory.
Any other input is left in `.cache/fuzz/<target>/`, beside the inputs that reached new code; move it to
`tests/data/hostile/`, where the tests replay it.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from fuzzing.limits import MEMORY, SECONDS, limit, resident
from rig import pack
from rig.tree import cache_folder

LONGEST = 2**15
DONE = re.compile(r"Done (\d+) runs in (\d+) second")
OWN_MUTATIONS = 0.7

pack.alias()


def main() -> None:
    """Print one line for each target; exit with 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seconds", type=int, default=0, help="for each target at most; 0: no limit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        limits = (f"-runs={options.runs}", f"-max_total_time={options.seconds}", f"-seed={options.seed}")
        fuzz(options.targets[0], options.inside, limits)
    from fuzzing.targets import TARGETS

    sound = [fuzzed(name, options) for name in options.targets or TARGETS]
    sys.exit(not all(sound))


def fuzzed(name: str, options: argparse.Namespace) -> bool:
    """Fuzz one target in a separate process, because the fuzzer ends its process."""
    shared = Path("/dev/shm")  # noqa: S108 - short-lived files
    wish = [f"--{key}={getattr(options, key)}" for key in ("runs", "seconds", "seed")]
    command = [sys.executable, __file__, name, *wish, "--inside"]
    with TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        done = subprocess.run([*command, folder], capture_output=True, text=True, errors="replace", check=False)
    found = DONE.search(done.stderr)
    if done.returncode or found is None:
        print(f"{name}: FOUND\n{done.stderr[-6000:]}", flush=True)
        return False
    runs, seconds = map(int, found.groups())
    slowest, most = re.findall(r"slowest (\S+) s, memory (\S+) MB", done.stdout)[-1]
    print(f"{name}: {runs:,} inputs, {seconds} s, none wrong; slowest {slowest} s, memory +{most} MB", flush=True)
    return True


def fuzz(name: str, folder: Path, limits: tuple[str, ...]) -> None:
    """Does not return."""
    import atheris

    with atheris.instrument_imports(include=["hswq.hswq_core"]):
        from fuzzing.targets import TARGETS

    target, corpus = TARGETS[name], cache_folder() / "fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(target.seeds(folder)):
        (corpus / f"seed-{i}").write_bytes(data)
    before, worst = resident(), Worst()

    def one(data: bytes) -> None:
        began = time.thread_time()
        target.run(data, folder)
        worst.note(time.thread_time() - began, resident() - before)

    def mutated(data: bytes, size: int, number: int) -> bytes:
        rng = random.Random(number)  # noqa: S311 - no secret
        own = target.mutation(data, rng) if target.mutation and rng.random() < OWN_MUTATIONS else None
        return atheris.Mutate(data, size) if own is None else own[:size]

    flags = [*limits, f"-max_len={LONGEST}", "-rss_limit_mb=0", "-timeout=60"]
    atheris.Setup([sys.argv[0], *flags, f"-artifact_prefix={corpus}/found-", str(corpus)], one, custom_mutator=mutated)
    with limit(MEMORY):
        atheris.Fuzz()


class Worst:
    """The slowest input and the highest memory use so far, stored where they survive the process."""

    def __init__(self) -> None:
        self.seconds, self.size = 0.0, 0

    def note(self, seconds: float, size: int) -> None:
        """Raise TimeoutError if an input took more than its second."""
        if seconds > self.seconds or size > self.size:
            self.seconds, self.size = max(seconds, self.seconds), max(size, self.size)
            print(f"slowest {self.seconds:.3f} s, memory {self.size / 1e6:.0f} MB", flush=True)
        if seconds > SECONDS:
            raise TimeoutError(f"{seconds:.2f} s")


if __name__ == "__main__":
    main()
