"""Writes a finished file from a source, a plan and a format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..calibration.session import Session
from ..devices import CPU
from ..errors import LayerError
from ..files.atomic import atomic_file
from ..files.checkpoint import TensorInfo, TensorSource
from ..files.writing import OutputTensor, write_checkpoint
from ..methods.solve import Solution
from ..model.kinds import KINDS, NAMES
from ..model.layer import WEIGHT, Layer, bias_key, layer_of, weight_key
from ..plan.formats import format_named
from ..plan.plan import QUANTIZE, LayerPlan, Plan
from ..progress import Progress, no_progress
from ..quant.schemes.scheme import Tensors
from ..quant.schemes.table import scheme_named
from .conversion import Conversion
from .header import header_metadata

PLAN_SUFFIX = ".plan.json"


def source_layers(source: TensorSource, prefix: str, kinds: Mapping[str, str]) -> list[Layer]:
    """Every observed layer as stored in the source, in source order.

    Args:
        prefix: prefix of the diffusion model's keys in the source ("" or "model.diffusion_model.").
        kinds: {layer name: kind} of the model.

    Raises:
        LayerError: a layer of the model is missing from the source, or its weight has the wrong rank.
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


@dataclass(frozen=True)
class Output:
    """A file to be written.

    Attributes:
        source: source of the tensors.
        prefix: prefix of the diffusion model's keys in it.
        plan: what is done to its layers.
        session: the calibration session used for the plan; None if the method needs none.
        solutions: {layer name: codes and bias correction} for quantized layers that the method rounded itself; all
            others are rounded to nearest.
        device: device used for planning, see ``made_with``.
    """

    source: TensorSource
    prefix: str
    plan: Plan
    session: Session | None = None
    solutions: Mapping[str, Solution] = field(default_factory=dict)
    device: torch.device = CPU

    def write(
        self, path: Path, progress: Progress = no_progress, check: Callable[[Path], None] | None = None
    ) -> Conversion:
        """Write the file and a human-readable plan beside it; for arguments and errors see ``write_checkpoint``."""
        metadata = header_metadata(self.source, self.plan, self.session, self.device)
        size = write_checkpoint(path, self.tensors(), metadata, progress=progress, check=check)
        with atomic_file(path.with_suffix(PLAN_SUFFIX)) as temporary:
            temporary.write_text(self.plan.to_json(indent=1) + "\n", encoding="utf-8")
        source_bytes = sum(info.nbytes for info in self.source.entries.values())
        return Conversion(path, size, source_bytes, self.plan, self.session)

    def tensors(self) -> list[OutputTensor]:
        """The file's tensors in source order; scales and markers directly follow their weight."""
        layers = {weight_key(layer.name, self.prefix): layer for layer in self.plan.layers}
        biases = {
            bias_key(layer.name, self.prefix): self.solutions[layer.name].bias
            for layer in self.plan.layers
            if layer.action == QUANTIZE and layer.name in self.solutions
        }
        tensors: list[OutputTensor] = []
        for key, info in self.source.entries.items():
            layer = layers.get(key)
            if layer is not None and layer.action == QUANTIZE:
                tensors += self._quantized(key, info, layer)
            elif (correction := biases.get(key)) is not None:
                tensors.append(OutputTensor(key, info, partial(self._corrected, key, correction)))
            else:
                tensors.append(self._kept(key, info, layer))
        return tensors

    def _quantized(self, key: str, info: TensorInfo, layer: LayerPlan) -> Iterator[OutputTensor]:
        scheme, row = scheme_named(layer.scheme), format_named(self.plan.file_format)
        input_scale = scheme.at(layer.input_amax, CPU).unit if layer.input_amax else None

        def rounded() -> Tensors:
            solution = self.solutions.get(layer.name)
            tensors = solution.tensors if solution else scheme.nearest_tensors(self.source.read(key), layer.amax)
            return row.spelled(scheme, tensors, input_scale)

        group = _InTurn(rounded)
        for name, tensor in row.spelled(scheme, scheme.described(info.shape), input_scale).items():
            described = TensorInfo(tensor.dtype, tuple(tensor.shape))
            yield OutputTensor(f"{key.removesuffix(WEIGHT)}.{name}", described, partial(group.take, name))

    def _corrected(self, key: str, correction: torch.Tensor) -> torch.Tensor:
        bias = self.source.read(key)
        return (bias.to(torch.float32) + correction.to(bias.device)).to(bias.dtype)

    def _kept(self, key: str, info: TensorInfo, layer: LayerPlan | None) -> OutputTensor:
        # Kept layers of a float32 source become FP16; tensors that are not layers stay unchanged.
        if layer is not None and info.dtype == torch.float32:
            return OutputTensor(
                key, TensorInfo(torch.float16, info.shape), lambda: _half(self.source.read(key), layer.name)
            )
        return OutputTensor(key, info, lambda: self.source.read(key))


class _InTurn:
    """A layer's tensors, written one after another but computed together when the first is requested."""

    def __init__(self, make: Callable[[], Tensors]) -> None:
        self._make = make
        self._pending: Tensors = {}

    def take(self, name: str) -> torch.Tensor:
        """Return one of them and drop the reference."""
        self._pending = self._pending or self._make()
        return self._pending.pop(name)


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
