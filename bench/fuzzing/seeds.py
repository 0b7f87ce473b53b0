"""Small valid files, as this pack and other tools write them: the starting points for fuzzing."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from hswq.hswq_core.calibration.observer import LayerStats
from hswq.hswq_core.calibration.session import Session, save_session
from hswq.hswq_core.calibration.states import SCHEDULE, Sample, State
from hswq.hswq_core.calibration.states_file import save_states
from hswq.hswq_core.model.fingerprint import Fingerprint, layout_hash
from hswq.hswq_core.plan.formats import comfy_marker
from hswq.hswq_core.plan.plan import KEEP, QUANTIZE, SKIP, LayerPlan, Plan
from hswq.hswq_core.quant.schemes.table import SCHEMES
from safetensors.torch import save_file

SHAPES = {"in.fc": ("Linear", (4, 3), 3), "mid.conv": ("Conv2d", (4, 2, 3, 3), 2), "out.fc": ("Linear", (2, 5), 5)}
PREFIX = "model.diffusion_model."
PLAN = Plan(
    "v2",
    "hswq",
    "0.25",
    "generic",
    (
        LayerPlan("in.fc", "Linear", (4, 3), QUANTIZE, "clip search", "fp8", 0.5, 3.0).measured(
            sensitivity=1.25, sqnr_db=31.5
        ),
        LayerPlan("mid.conv", "Conv2d", (4, 2, 3, 3), KEEP, "high sensitivity").measured(change=1e-9),
        LayerPlan("out.fc", "Linear", (2, 5), SKIP, "not used").measured(loss=0.5, nearest_loss=1.0),
    ),
)


def empty_layers() -> dict[str, LayerStats]:
    """Empty statistics of the model that all seeds belong to."""
    return {name: LayerStats.empty(*row) for name, row in SHAPES.items()}


def fingerprint() -> Fingerprint:
    """Fingerprint of that model."""
    layout = layout_hash({name: (kind, shape) for name, (kind, shape, _) in SHAPES.items()})
    return Fingerprint(layout, torch.linspace(-1, 1, 4 * len(SHAPES)))


def session(path: Path) -> Path:
    """A session of two calls."""
    layers = empty_layers()
    for stats in layers.values():
        stats.in_calls = stats.out_calls = 2
        stats.out_sum, stats.out_sq_sum, stats.input_amax = -1.5, 2.25, 3.0
        stats.abs_sum, stats.mean_sum = stats.abs_sum + 2, stats.mean_sum - 0.5
    save_session(Session("generic", fingerprint(), layers, 2, 1, {20: 1}, 10.0, 20.0), path)
    return path


def predecessor(path: Path) -> Path:
    """A session in the predecessor's layout, for the same model."""
    layers = {
        PREFIX + name: {
            "output_sum": 6.0,
            "output_sq_sum": 12.0,
            "out_count": 3,
            "input_imp_sum": torch.ones(channels, dtype=torch.float64),
            "in_count": 3,
        }
        for name, (_, _, channels) in SHAPES.items()
    }
    torch.save({"meta": {"type": "hswq_dual_monitor_v2"}, "layers": layers}, path)
    return path


def states(path: Path) -> Path:
    """Three calls that share their conditioning, with a list among their arguments."""
    context, schedule = torch.ones(1, 2, 4), torch.linspace(1, 0, 3)
    sample = Sample(8)
    for i in range(3):
        own = {"x": torch.full((1, 2, 2), float(i)), "sigma": torch.ones(1)}
        shared = {"c_crossattn": context, SCHEDULE: schedule, "ref/0": context, "ref/1": context * 2}
        sample.add([State(0.1 * i + 0.05, {**own, **shared}, {"guidance": 3.5, "name": "text", "flag": True})])
    save_states(sample, fingerprint(), path)
    return path


def checkpoint(path: Path) -> Path:
    """An FP8 file with our header, scales under every spelling, and a marker."""
    codes = torch.ones(4, 3).to(torch.float8_e4m3fn)
    tensors = {f"{PREFIX}{name}.weight": codes.clone() for name in ("a", "b", "c", "d", "e")}
    suffixes = ("weight_scale", "scale_weight", "scale", "weight.scale")
    tensors |= {f"{PREFIX}{name}.{suffix}": torch.ones(1) for name, suffix in zip("abcd", suffixes, strict=True)}
    tensors |= {f"{PREFIX}d.scale": torch.full((4,), 0.5), f"{PREFIX}n.weight": torch.ones(2, 2, 3, 3).half()}
    tensors |= {f"{PREFIX}a.comfy_quant": comfy_marker(SCHEMES["fp8"].marker(full_precision=True))}
    record = {"version": 1, "format": "v2", "counts": {"quantize": 5}, "session": None}
    metadata = {"hswq": json.dumps(record), "hswq_plan": PLAN.to_json(), "format": "pt"}
    save_file(tensors, path, metadata)
    return path


def pickle_of(path: Path) -> tuple[bytes, dict[str, bytes]]:
    """The pickle of a ``.pt``, and {name: content} of its other members."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (key,) = (name for name in parts if name.endswith("/data.pkl"))
    return parts.pop(key), parts


def archived(path: Path, pickle: bytes, parts: dict[str, bytes]) -> Path:
    """A ``.pt`` of these parts with correct checksums; twenty times as fast as ``zipfile``, to speed up fuzzing."""
    folder = next((name.partition("/")[0] for name in parts), "s")
    data, directory = bytearray(), bytearray()
    for name, content in {f"{folder}/data.pkl": pickle, **parts}.items():
        raw = name.encode()
        common = struct.pack("<5H3L2H", 20, 0, 0, 0, 0, zlib.crc32(content), len(content), len(content), len(raw), 0)
        directory += b"PK\1\2\x14\0" + common + struct.pack("<3H2L", 0, 0, 0, 0, len(data)) + raw
        data += b"PK\3\4" + common + raw + content
    count = len(parts) + 1
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(data), 0)
    path.write_bytes(data + directory + end)
    return path


def header_of(path: Path) -> tuple[bytes, bytes]:
    """(JSON, data) of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]
