"""What every scheme answers: in which steps a weight is rounded, what its codes are, which tensors hold them.

Rounding goes through five calls, so that compensated rounding, clip search and nearest rounding are written once:
``steps`` fixes the step of each element, ``into`` expresses the weight in these steps, ``nearest`` (or a solver that
calls it) chooses values a code exists for, ``cast`` makes them codes, ``tensors`` makes the codes what a file holds.
``restored`` goes all the way back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..grid import PIECE, by_channel, largest, largest_of_channels, pieces

# What one scale serves.
TENSOR, CHANNEL = "tensor", "channel"
GRANULARITIES = (TENSOR, CHANNEL)
# Names of the tensors of a quantized layer X, after "X.". File formats may spell them another way.
CODES, SCALE = "weight", "weight_scale"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Steps:
    """What a weight is rounded in, fixed before it is rounded.

    Attributes:
        unit: float32 step, the multiplier at dequantize: [], or [out, 1, ...] with one for each output channel.
        limit: values beyond ±limit are clipped to it first, in the weight's own units; None: codes saturate by
            themselves. It broadcasts over the weight.
    """

    unit: torch.Tensor
    limit: torch.Tensor | None = None

    def pieces(self, w: torch.Tensor) -> Iterator[tuple[torch.Tensor, Steps]]:
        """(part of ``w``, its steps) in order: parts that stay in a CPU's cache, the whole weight on a GPU."""
        if self.unit.numel() == 1:
            yield from ((piece, self) for piece in pieces(w))
            return
        rows = max(1, PIECE * len(w) // max(1, w.numel())) if w.device.type == "cpu" else len(w)
        for part, unit in zip(w.split(rows), self.unit.split(rows), strict=True):
            yield part, Steps(unit, self.limit)


class Scheme(ABC):
    """One row of the table, see ``table``.

    Attributes:
        name: in plans and reports.
        number_format: ComfyUI's name of the codes, as ``comfy_quant`` says it.
        dtype: of the codes in a file.
        scaled: whether a scale is stored beside the codes.
        granularity: "tensor" or "channel": what one scale serves.
        plain_limit: clip limit at which the steps are 1, as a cast without scaling has them; 0: there is none.
        judged_against: scheme of the same size that a format may want a layer to be nearly as good as; "": none.
        stock_since: oldest ComfyUI release, of those tested, whose own loaders open it; "": none does.
    """

    name: ClassVar[str]
    number_format: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    scaled: ClassVar[bool] = True
    granularity: ClassVar[str] = TENSOR
    plain_limit: ClassVar[float] = 0.0
    judged_against: ClassVar[str] = ""
    stock_since: ClassVar[str] = ""

    @abstractmethod
    def limited(self, limit: float | torch.Tensor) -> Steps:
        """Steps that map ``limit`` (any shape, ≥ 0) onto the largest code; of an all-zero weight they are 1."""

    @abstractmethod
    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of the values nearest to ``x``, float32 in steps, any shape; ties to even, saturating."""

    @abstractmethod
    def widen(self, codes: torch.Tensor) -> torch.Tensor:
        """Values of codes, float32 in steps."""

    def refusal(self, kind: str, shape: tuple[int, ...]) -> str | None:  # noqa: ARG002 - for those that refuse
        """Why a weight of this shape in a layer of this kind cannot be stored so; None if it can."""
        return None

    def steps(self, w: torch.Tensor, amax: float | None = None) -> Steps:
        """Steps of a finite weight [out, ...], on its device.

        Args:
            amax: clip limit; None: the largest magnitude of what each scale serves.
        """
        if self.granularity == TENSOR:
            return self.at(largest(w) if amax is None else amax, w.device)
        tops = largest_of_channels(w)
        return self.at(tops if amax is None else tops.clamp(max=amax), w.device)

    def at(self, limit: float | torch.Tensor, device: torch.device) -> Steps:
        """``limited`` with its unit on a device."""
        steps = self.limited(limit)
        return Steps(steps.unit.to(device), None if steps.limit is None else steps.limit.to(device))

    def into(self, w: torch.Tensor, steps: Steps) -> torch.Tensor:
        """A weight, or a part of one, in steps: float32."""
        w = w.to(torch.float32)
        if steps.limit is not None:
            w = w.clamp(-steps.limit, steps.limit)
        return w / steps.unit if self.scaled else w

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest values that codes have, float32 in steps."""
        return self.widen(self.cast(x))

    def rounded(self, w: torch.Tensor, steps: Steps) -> torch.Tensor:
        """A weight, or a part of one, as it is restored after rounding to nearest: float32."""
        values = self.nearest(self.into(w, steps))
        return values.mul_(steps.unit) if self.scaled else values

    def fake_quantize(self, w: torch.Tensor, amax: float | None = None) -> torch.Tensor:
        """``rounded`` of a whole weight with the steps for this clip limit, see ``steps``."""
        return self.restored(self.nearest_tensors(w, amax))

    def nearest_tensors(self, w: torch.Tensor, amax: float | None = None) -> Tensors:
        """What a file holds of a weight rounded to nearest, see ``steps`` and ``tensors``."""
        steps = self.steps(w, amax)
        codes = torch.empty(w.shape, dtype=self.dtype, device=w.device)
        flat, done = codes.flatten(), 0
        for piece, own in steps.pieces(w):
            flat[done : done + piece.numel()] = self.cast(self.into(piece, own)).flatten()
            done += piece.numel()
        return self.tensors(codes, steps)

    def tensors(self, codes: torch.Tensor, steps: Steps) -> Tensors:
        """What a file holds of these codes, in the weight's shape: {``CODES``: ..., ``SCALE``: ...}."""
        return {CODES: codes, SCALE: steps.unit} if self.scaled else {CODES: codes}

    def described(self, shape: tuple[int, ...]) -> Tensors:
        """``tensors`` of a weight of this shape, without their data: on the meta device."""
        unit = (shape[0], *[1] * (len(shape) - 1)) if self.granularity == CHANNEL else ()
        steps = Steps(torch.empty(unit, device="meta"))
        return self.tensors(torch.empty(shape, dtype=self.dtype, device="meta"), steps)

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight that a loader makes of ``tensors``, float32 in its own shape and basis."""
        values = self.widen(tensors[CODES])
        return values.mul_(by_channel(tensors[SCALE], values.dim())) if self.scaled else values

    def code_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the codes of a weight of this shape."""
        return math.prod(shape) * self.dtype.itemsize

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of this shape with its scales; a single one does not count (see ``budget``)."""
        return self.code_bytes(shape) + (4 * shape[0] if self.granularity == CHANNEL else 0)

    def activations(self, x: torch.Tensor, amax: float) -> torch.Tensor:  # noqa: ARG002 - for those that cast them
        """What a loader makes of inputs where it multiplies by codes, in their dtype; ``amax``: their clip limit."""
        return x

    def marker(self, *, full_precision: bool) -> dict[str, object] | None:
        """Record of ``comfy_quant``; None for what ComfyUI loads without one.

        Args:
            full_precision: whether loaders must leave activations alone.
        """
        if not self.scaled:
            return None
        return {"format": self.number_format, "full_precision_matrix_mult": full_precision}
