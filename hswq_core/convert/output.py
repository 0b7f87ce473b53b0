"""From a source, a plan and a format to a finished file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..calibration.session import Session
from ..errors import LayerError
from ..files.atomic import atomic_file
from ..files.checkpoint import TensorInfo, TensorSource
from ..files.writing import OutputTensor, write_checkpoint
from ..methods.solve import Solution
from ..model.families import GENERIC, Family, family_named
from ..model.kinds import KINDS, NAMES
from ..model.layer import Layer, bias_key, layer_of, weight_key
from ..plan.formats import FileFormat, format_for, format_named
from ..plan.plan import KEEP, QUANTIZE, LayerPlan, Plan
from ..progress import Progress, no_progress
from ..quant.grid import GRIDS
from .header import CPU, header_metadata

PLAN_SUFFIX = ".plan.json"
NONE: Mapping[str, Solution] = {}


def source_layers(source: TensorSource, prefix: str, kinds: Mapping[str, str]) -> list[Layer]:
    """Every observed layer as the source holds it, in the source's order.

    Args:
        prefix: of the diffusion model's keys in the source ("" or "model.diffusion_model.").
        kinds: {layer name: kind} of the model.

    Raises:
        LayerError: the source lacks a layer of the model.
    """
    layers = []
    for key, info in source.entries.items():
        name = layer_of(key, prefix)
        if name is not None and name in kinds:
            layers.append(Layer(name, kinds[name], info.shape, info.dtype))
    missing = sorted(set(kinds) - {layer.name for layer in layers})
    wrong = [layer.name for layer in layers if len(layer.shape) != KINDS[layer.kind].rank]
    if missing or wrong:
        raise LayerError(
            f"{source.name}, layer {(missing + wrong)[0]}",
            got="no weight of that name" if missing else "a weight of another rank",
            expected=f"the weights of all {len(kinds)} {NAMES} layers",
            remedy="Convert the model the session was made with.",
        )
    return layers


def output_tensors(
    source: TensorSource, prefix: str, plan: Plan, solutions: Mapping[str, Solution] = NONE
) -> list[OutputTensor]:
    """The file's tensors in the source's order: scale and marker directly after their weight.

    Args:
        solutions: {layer name: codes and bias correction} of the quantized layers a method has rounded itself; the
            others are rounded to nearest.
    """
    layers = {weight_key(layer.name, prefix): layer for layer in plan.layers}
    biases = {
        bias_key(layer.name, prefix): solutions[layer.name].bias
        for layer in plan.layers
        if layer.action == QUANTIZE and layer.name in solutions
    }
    found: list[OutputTensor] = []
    for key, info in source.entries.items():
        layer = layers.get(key)
        if layer is not None and layer.action == QUANTIZE:
            found += _quantized(source, key, info, layer, plan, solutions.get(layer.name))
        elif (correction := biases.get(key)) is not None:
            found.append(OutputTensor(key, info, partial(_corrected, source, key, correction)))
        else:
            found.append(_kept(source, key, info, layer))
    return found


def _corrected(source: TensorSource, key: str, correction: torch.Tensor) -> torch.Tensor:
    bias = source.read(key)
    return (bias.to(torch.float32) + correction.to(bias.device)).to(bias.dtype)


def _kept(source: TensorSource, key: str, info: TensorInfo, layer: LayerPlan | None) -> OutputTensor:
    # A float32 source's kept layers become FP16; everything that is no layer survives as it is.
    if layer is not None and info.dtype == torch.float32:
        return OutputTensor(key, TensorInfo(torch.float16, info.shape), lambda: _half(source.read(key), layer.name))
    return OutputTensor(key, info, lambda: source.read(key))


def _quantized(
    source: TensorSource, key: str, info: TensorInfo, layer: LayerPlan, plan: Plan, solution: Solution | None
) -> Iterator[OutputTensor]:
    grid, row = GRIDS[plan.grid], format_named(plan.file_format)

    def codes() -> torch.Tensor:
        if solution is not None:
            return solution.codes
        return grid.quantize(source.read(key), layer.amax, scaled=layer.scaled)[0]

    yield OutputTensor(key, TensorInfo(grid.dtype, info.shape), codes)
    scale = solution.scale if solution is not None else grid.scale(layer.amax) if layer.scaled else None
    input_scale = grid.scale(layer.input_amax) if layer.input_amax else None
    stem = key[: -len("weight")]
    for suffix, tensor in row.extra_tensors(grid, scale, input_scale).items():
        described = TensorInfo(tensor.dtype, tuple(tensor.shape))
        yield OutputTensor(stem + suffix, described, partial(_same, tensor))


def _half(w: torch.Tensor, name: str) -> torch.Tensor:
    half = w.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise LayerError(
            f"Layer {name}, weight",
            got="NaN, or values beyond float16's 65504",
            expected="a weight that float16 can hold, since this layer is kept in 16 bits",
            remedy="Convert a bfloat16 copy of the model.",
        )
    return half


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Conversion:
    """A finished file.

    Attributes:
        path: where it is.
        size: bytes of the file.
        source_bytes: bytes of the source's tensors.
        plan: what was done.
    """

    path: Path
    size: int
    source_bytes: int
    plan: Plan


def write_plan(
    path: Path,
    source: TensorSource,
    prefix: str,
    plan: Plan,
    session: Session | None,
    *,
    solutions: Mapping[str, Solution] = NONE,
    progress: Progress = no_progress,
    check: Callable[[Path], None] | None = None,
    device: torch.device = CPU,
) -> Conversion:
    """Write the file a plan describes, and the plan beside it for people to read.

    See ``output_tensors`` for ``solutions``, ``header_metadata`` for ``device``, and ``write_checkpoint`` for
    ``progress``, ``check`` and errors.
    """
    tensors = output_tensors(source, prefix, plan, solutions)
    metadata = header_metadata(source, plan, session, device)
    size = write_checkpoint(path, tensors, metadata, progress=progress, check=check)
    with atomic_file(path.with_suffix(PLAN_SUFFIX)) as temporary:
        temporary.write_text(plan.to_json(indent=1) + "\n", encoding="utf-8")
    return Conversion(path, size, sum(info.nbytes for info in source.entries.values()), plan)


def report(done: Conversion, session: Session | None) -> str:
    """Text for the node and the log: size, accounting, worst layer, and where the file opens."""
    plan, family = done.plan, family_named(done.plan.family)
    row = format_for(format_named(plan.file_format), family)
    lines = [
        f"{done.path.name}",
        f"{plan.family}, {row.name}, {' '.join(('method', plan.method, plan.budget)).strip()}, {_measured(session)}",
        f"{done.size / 2**20:.1f} MB ({done.size / max(done.source_bytes, 1):.1%} of the source)",
        plan.accounting(),
        *_kept_lines(plan),
        *_worst_lines(plan),
        *_learned_lines(plan),
        f"Opens in: {row.opens_in}.",
        *_warnings(row, family),
    ]
    return "\n".join(lines)


def _measured(session: Session | None) -> str:
    return f"session of {session.calls} calls" if session else "without calibration"


def _kept_lines(plan: Plan) -> list[str]:
    return [f"kept, {reason}: {n}" for reason, n in sorted(plan.by_reason(KEEP).items())]


def _worst_lines(plan: Plan) -> list[str]:
    measured = [layer for layer in plan.layers if layer.sqnr_db is not None]
    if not measured:
        return []
    values = [layer.sqnr_db or 0.0 for layer in measured]
    worst = min(measured, key=lambda layer: layer.sqnr_db or 0.0)
    return [f"weight SQNR: mean {sum(values) / len(values):.1f} dB, worst {worst.sqnr_db:.1f} dB ({worst.name})"]


def _learned_lines(plan: Plan) -> list[str]:
    tried = [(layer.loss, layer.nearest_loss) for layer in plan.layers if layer.loss is not None and layer.nearest_loss]
    if not tried:
        return []
    won = sum(loss < nearest for loss, nearest in tried)
    less = 1 - sum(loss / nearest for loss, nearest in tried) / len(tried)
    return [f"learned rounding: quantized loss {less:.0%} below nearest on average, {won} of {len(tried)} layers"]


def _warnings(row: FileFormat, family: Family) -> list[str]:
    notes = []
    if row.name == "v1" and not family.text_encoder:
        notes.append(
            "Stock loaders on cards with FP8 compute turn every layer of a v1 file to FP8, the kept ones too: "
            "open it in HSWQ Loader, or use the comfy format."
        )
    if family.text_encoder and not row.scaled_kinds:
        notes.append("ComfyUI widens it to 16 bits when it loads: half the file, but no less memory.")
    if family.name == GENERIC.name:
        notes.append("No known model family: all layers were treated alike (generic).")
    return notes
