"""Everything that needs an environment: `nox -s tests`, `nox -s demo`, `nox -l` for all.

    python -m pip install "nox[uv]"

Each session owns an environment under `.nox/`, filled from the pins of one ComfyUI version
(`bench/rig/pins/`). Installing is repeated at every run, so an environment follows its pins;
when nothing has changed that takes about a second. `pip` does it where uv is missing.

HSWQ_COMFYUI   ComfyUI version of tests, slow, demo and bench: 0.30.0 (default), 0.24.1 or 0.18.2
COMFYUI_PATH   a ComfyUI of your own instead, any version: its own requirements.txt is installed,
               unpinned, and the sessions use that folder as it is (nothing is written there)
HSWQ_CACHE     where ComfyUI and test models are kept, default `.cache/`
HSWQ_THREADS   threads of torch in each process of the tests, default: two cores shared among the workers
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

RUFF = "ruff==0.17.6"
MYPY = "mypy==2.4.1"
ATHERIS = "atheris==3.0.0"

HERE = Path(__file__).resolve().parent
PINS = HERE / "bench" / "rig" / "pins"
DEFAULT = "0.30.0"
OTHERS = ("0.24.1", "0.18.2")
# A file stays on one worker, since its tests share what they make. (xdist 3.8 sees no loadgroup in pytest 9.2.)
WORKERS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]


def requirements(version: str) -> list[str]:
    """Arguments of `session.install` for one ComfyUI version, or for COMFYUI_PATH."""
    own = os.environ.get("COMFYUI_PATH")
    if own:
        return ["-r", str(Path(own) / "requirements.txt"), "-r", str(PINS / "common.in")]
    pins = PINS / f"comfyui-{version}.txt"
    if not pins.is_file():
        known = ", ".join((DEFAULT, *OTHERS))
        raise SystemExit(f"HSWQ_COMFYUI={version}: no pins, expected one of {known}")
    return ["-r", str(pins)]


def comfy(session: nox.Session, *command: str, version: str | None = None, also: tuple[str, ...] = ()) -> None:
    """Run `python COMMAND` in the environment of a ComfyUI version (default: HSWQ_COMFYUI), plus `also`."""
    version = version or os.environ.get("HSWQ_COMFYUI") or DEFAULT
    session.install(*requirements(version), *also)
    session.run("python", *command, env={"HSWQ_COMFYUI": version})


@nox.session
def lint(session: nox.Session) -> None:
    """Rules and format."""
    session.install(RUFF)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(name="format")
def format_(session: nox.Session) -> None:
    """Repair what lint can repair."""
    session.install(RUFF)
    session.run("ruff", "check", "--fix", ".")
    session.run("ruff", "format", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the whole pack, with ComfyUI's tree beside it."""
    session.install(*requirements(DEFAULT), MYPY)
    where = "from rig.tree import comfy_tree; print(comfy_tree())"
    env = {"PYTHONPATH": str(HERE / "bench"), "HSWQ_COMFYUI": DEFAULT}
    tree = str(session.run("python", "-c", where, env=env, silent=True)).splitlines()[-1]
    root = Path(session.create_tmp()).resolve()
    if not (root / "hswq").is_symlink():
        (root / "hswq").symlink_to(HERE, target_is_directory=True)
    options = ["--config-file", str(HERE / "pyproject.toml"), "--cache-dir", str(HERE / ".mypy_cache")]
    session.chdir(root)  # mypy also looks for modules in the folder it runs in
    session.run("mypy", *options, *session.posargs, env={"MYPYPATH": os.pathsep.join((str(root), tree))})


@nox.session(tags=["all"])
def tests(session: nox.Session) -> None:
    """Every test but the slow ones, on two workers (`-- -n 0`: in this process)."""
    comfy(session, "-m", "pytest", *WORKERS, "-m", "not slow", *session.posargs)


@nox.session(tags=["all"])
def slow(session: nox.Session) -> None:
    """The slow tests: big models, long runs."""
    comfy(session, "-m", "pytest", "-m", "slow", *session.posargs)


def _compat(version: str) -> None:
    @nox.session(name=f"compat-{version}", tags=["all", "compat"])
    def compat(session: nox.Session) -> None:
        arguments = ("-m", "pytest", "-m", "compat and not slow", *session.posargs)
        comfy(session, *arguments, version=version)

    compat.__doc__ = f"The quick tests marked compat, on ComfyUI {version}."


for _version in OTHERS:
    _compat(_version)


@nox.session
def demo(session: nox.Session) -> None:
    """Calibrate, convert, load and compare a small model in a real ComfyUI."""
    comfy(session, "bench/demo.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """`nox -s bench -- SCRIPT ARGS`: one benchmark of bench/."""
    if not session.posargs:
        session.error("which one? e.g. nox -s bench -- speed.py")
    script, *rest = session.posargs
    comfy(session, f"bench/{script}", *rest)


@nox.session
def quality(session: nox.Session) -> None:
    """Judge every method, other tools too, by the pictures of the reference models (hours: see `--quick`)."""
    peers = HERE / "bench" / "judge" / "peers.txt"
    comfy(session, "bench/quality.py", *session.posargs, also=("-r", str(peers)))


@nox.session
def fuzz(session: nox.Session) -> None:
    """`nox -s fuzz -- TARGET --runs N`: hostile input for the readers, guided by coverage (Linux)."""
    comfy(session, "bench/fuzz.py", *session.posargs, also=(ATHERIS,))


@nox.session(venv_backend="none")
def pins(session: nox.Session) -> None:
    """Compile bench/rig/pins/*.in anew (posargs, e.g. `--upgrade`, go to uv)."""
    options = ["--universal", "--python-version", "3.10", "--no-annotate", "--no-emit-index-url"]
    options += ["--custom-compile-command", "nox -s pins", "--quiet"]
    session.chdir(PINS)
    for version in (DEFAULT, *OTHERS):
        files = [f"comfyui-{version}.in", "--output-file", f"comfyui-{version}.txt"]
        session.run("uv", "pip", "compile", *options, *files, *session.posargs, external=True)
