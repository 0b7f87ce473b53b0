"""sha256 of everything the pack makes from the reference models, which a refactoring must not change.

    nox -s bench -- hashes.py --write before.json      # on the commit to compare with
    nox -s bench -- hashes.py --against before.json    # on yours, same machine: exit 1 if anything differs

Uses only node ids and the command line, so that it runs on any layout of the code. The order of summation depends on
the machine and the number of threads, so compare hashes on one machine only. Times and dates are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from reference_models.architectures import REFERENCES, Reference, register
from reference_models.prompts import calibration_prompts
from reference_models.sampling import draw
from rig import pack
from rig.inprocess import load_comfy, load_model
from safetensors import safe_open

FORMATS = ("v1", "v2", "comfy")
FILE_METHODS = ("nearest", "learned", "hswq")
# Extra inputs of HSWQ Converter, under a short name.
OPTIONS = {
    "v2 per channel": {"format": "v2", "scale_per": "channel"},
    "comfy fast": {"format": "comfy", "fast_matmul": 3.0},
    "v2 at 6 %": {"format": "v2", "extra_percent": 6.0},
}
# Fields of headers and plans that release 0.2 did not have.
ADDED = ("scheme", "plan", "schemes", "comfyui")
VOLATILE = ("created", "updated")
# Dates, and the size of a file, which follows from its header.
LEFT_OUT = re.compile(r"recorded \d{4}-\d\d-\d\d( to \d{4}-\d\d-\d\d)?|[\d.]+ MB \([\d.]+% of the source\)")
Hashes = dict[str, str]


def main() -> None:
    """Make everything, then write or compare."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--models", nargs="*", choices=sorted(REFERENCES), default=sorted(REFERENCES))
    asked.add_argument("--pictures", type=int, default=8, help="to calibrate with")
    asked.add_argument("--threads", type=int, default=1, help="of torch")
    asked.add_argument("--write", type=Path, help="JSON to write")
    asked.add_argument("--against", type=Path, help="JSON to compare with")
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    load_comfy()
    register()
    pack.alias()
    found = schemas()
    for name in options.models:
        for what, value in made(REFERENCES[name], options.pictures, options.threads):
            found[f"{name}: {what}"] = value
            print(f"{value[:16]}  {name}: {what}", flush=True)
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.against:
        agree(found, json.loads(options.against.read_text(encoding="utf-8")), options.models)


def agree(found: Hashes, before: Hashes, models: list[str]) -> None:
    """Exit with 1, naming what differs."""
    before = {key: value for key, value in before.items() if key.partition(":")[0] in (*models, "node")}
    wrong = sorted(key for key in {*found, *before} if found.get(key) != before.get(key))
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(before)} differ:\n" + "\n".join(wrong))
    print(f"All {len(before)} as before.")


def schemas() -> Hashes:
    """Ids, inputs, defaults and outputs of every node, without the lists of files."""
    return {f"node: {kind.GET_SCHEMA().node_id}": text_hash(json.dumps(_shown(kind))) for kind in _nodes()}


def _shown(kind: Any) -> dict[str, Any]:
    info = json.loads(json.dumps(kind.GET_NODE_INFO_V1(), default=str))
    for inputs in info["input"].values():
        for name in ("file", "ckpt_name", "model_name"):
            if name in inputs:
                inputs[name] = "a list of files"
    return dict(info)


def made(reference: Reference, pictures: int, threads: int) -> Iterator[tuple[str, str]]:
    """(what, sha256) of session, states, files and reports of one model."""
    import folder_paths

    model, session = calibrated(reference, pictures)
    folder = Path(folder_paths.get_output_directory()) / "hswq_stats"
    yield "session", session_hash(folder / f"{session}.pt")
    yield "states", file_hash(folder / f"{session}.states.safetensors")
    yield "report of the session", text_hash(run("HSWQReport", session=session, file="none")[1])
    yield from converted(model, session)
    source = listed(reference)
    for method in FILE_METHODS:
        for name in FORMATS:
            given = {"session": session} if method == "hswq" else {}
            path, text = run("HSWQFileConverter", file=source, format=name, method=method, preset="auto", **given)
            yield from finished(f"file {method} {name}", path, text)
    yield from by_command(reference, folder / f"{session}.pt", threads)


def calibrated(reference: Reference, pictures: int) -> tuple[Any, str]:
    """The MODEL, and the name of its session, made by HSWQ Calibration."""
    session = f"{reference.name}_hashes"
    with torch.inference_mode():
        model = load_model(reference.file)
    settings = {"save_every": 1000, "states": -1, "measure_every": 2}
    watched = run("HSWQCalibration", model=model, session=session, **settings)[0]
    draw(watched, reference, calibration_prompts(pictures))
    return model, session


def converted(model: Any, session: str) -> Iterator[tuple[str, str]]:
    """What HSWQ Converter makes."""
    usual = {"extra_percent": 3.0, "keep_ratio": 0.25}
    for method in ("model_aware", "hswq"):
        for name in FORMATS:
            path, text = run("HSWQConverter", model=model, session=session, format=name, method=method, **usual)
            yield from finished(f"{method} {name}", path, text)
    for what, settings in OPTIONS.items():
        given = {"model": model, "session": session, "method": "model_aware", **usual, **settings}
        path, text = run("HSWQConverter", **given)
        yield from finished(f"model_aware {what}", path, text)


def finished(what: str, path: str, text: str) -> Iterator[tuple[str, str]]:
    """Hashes of a written file: its name, tensors, header, the plan beside it, and the report."""
    file = Path(path)
    yield f"{what}, name", text_hash(file.name)
    yield f"{what}, tensors", tensors_hash(file)
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    parsed = {key: json.loads(text) if key.startswith("hswq") else text for key, text in metadata.items()}
    yield f"{what}, header", text_hash(json.dumps(without(parsed), sort_keys=True))
    beside = json.loads(file.with_suffix(".plan.json").read_text(encoding="utf-8"))
    yield f"{what}, plan", text_hash(json.dumps(without(beside), sort_keys=True))
    yield f"{what}, said", text_hash(text)
    yield f"{what}, report", text_hash(run("HSWQReport", session="", file="none", path=path)[1])


def without(record: Any) -> Any:
    """A record without the fields that were added on purpose since the commit to compare with."""
    if isinstance(record, dict):
        return {key: without(value) for key, value in record.items() if key not in ADDED}
    return [without(item) for item in record] if isinstance(record, list) else record


def by_command(reference: Reference, session: Path, threads: int) -> Iterator[tuple[str, str]]:
    """What the command line writes and prints."""
    output = session.parent.parent / "by_command"
    output.mkdir(exist_ok=True)
    for method in FILE_METHODS:
        arguments = ["--method", method, "--session", str(session), "--device", "cpu", "-o", str(output)]
        command(threads, "convert", str(reference.file), *arguments)
        file = max(output.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        yield f"command {method} v2, name", text_hash(file.name)
        yield f"command {method} v2, tensors", tensors_hash(file)
        yield f"command inspect {method}", text_hash(command(threads, "inspect", str(file)))
        yield f"command compare {method}", text_hash(command(threads, "compare", str(reference.file), str(file)))
        yield f"command verify {method}", text_hash(command(threads, "verify", str(file)))
    yield "command inspect session", text_hash(command(threads, "inspect", str(session)))


def command(threads: int, *arguments: str) -> str:
    """Output of ``python -m hswq_core``."""
    code = f"import sys, runpy, torch; torch.set_num_threads({threads}); sys.argv[0] = 'hswq_core'; "
    code += "runpy.run_module('hswq_core', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=pack.ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def listed(reference: Reference) -> str:
    """The model as HSWQ File Converter lists it."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("diffusion_models")[0])
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{reference.name}-hashes.safetensors"
    if not (folder / name).exists():
        (folder / name).symlink_to(reference.file)
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    return f"diffusion_models/{name}"


def run(node_id: str, **inputs: Any) -> tuple[Any, ...]:
    """Outputs of a node, as the server runs it."""
    (kind,) = (kind for kind in _nodes() if kind.GET_SCHEMA().node_id == node_id)
    clone = kind.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    with torch.inference_mode():
        return tuple(clone.execute(**inputs).args)


def _nodes() -> list[Any]:
    from server import PromptServer

    if getattr(PromptServer, "instance", None) is None:
        PromptServer.instance = None  # no client is listening
    from hswq.nodes import NODES

    return list(NODES)


def session_hash(path: Path) -> str:
    """Hash of a session's content without its times."""
    data = torch.load(path, weights_only=True)
    for name in VOLATILE:
        del data["meta"][name]
    return text_hash(_canonical(data))


def _canonical(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_canonical(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, torch.Tensor):
        content = hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        return f"{value.dtype}{tuple(value.shape)}{content}"
    return repr(value)


def tensors_hash(path: Path) -> str:
    """Hash of a safetensors file's tensors, in the order of the file, without its metadata."""
    found = hashlib.sha256()
    with safe_open(path, "pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            tensor = opened.get_tensor(key)
            found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def file_hash(path: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def text_hash(text: str) -> str:
    """Hash of a text without what ``LEFT_OUT`` matches."""
    return hashlib.sha256(LEFT_OUT.sub("", text).encode()).hexdigest()


if __name__ == "__main__":
    main()
