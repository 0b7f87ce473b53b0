"""Interface of all schemes: the steps a weight is rounded in, its codes, and the tensors that store them.

Rounding takes five calls, so that compensated rounding, clip search and round to nearest are each written once:
``steps`` fixes the step of each element, ``into`` expresses the weight in steps, ``nearest`` (or a solver that calls
it) picks representable values, ``cast`` turns them into codes, and ``tensors`` packs the codes as a file stores them.
``restored`` is the inverse of all of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..grid import PIECE, by_channel, largest, largest_of_channels, pieces

# What one scale covers.
TENSOR, CHANNEL = "tensor", "channel"
GRANULARITIES = (TENSOR, CHANNEL)
# Tensor names of a quantized layer X, after "X.". File formats may spell them differently.
CODES, SCALE = "weight", "weight_scale"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Steps:
    """The step sizes a weight is rounded with, fixed before rounding.

    Attributes:
        unit: float32 step, the multiplier at dequantize: [], or [out, 1, ...] if per output channel.
        limit: values are first clipped to ±limit, in the weight's own units; None: codes saturate by themselves.
            Broadcasts over the weight.
    """

    unit: torch.Tensor
    limit: torch.Tensor | None = None

    def pieces(self, w: torch.Tensor) -> Iterator[tuple[torch.Tensor, Steps]]:
        """(part of ``w``, its steps) in order: parts that fit a CPU's cache, the whole weight on a GPU."""
        if self.unit.numel() == 1:
            yield from ((piece, self) for piece in pieces(w))
            return
        rows = max(1, PIECE * len(w) // max(1, w.numel())) if w.device.type == "cpu" else len(w)
        for part, unit in zip(w.split(rows), self.unit.split(rows), strict=True):
            yield part, Steps(unit, self.limit)


class Scheme(ABC):
    """One row of the table, see ``table``.

    Attributes:
        name: shown in plans and reports.
        number_format: ComfyUI's name for the codes, as in ``comfy_quant``.
        dtype: dtype of the codes in a file.
        scaled: whether a scale is stored beside the codes.
        granularity: "tensor" or "channel": what one scale covers.
        plain_limit: clip limit at which the steps are 1, as in a cast without scaling; 0: there is none.
        judged_against: scheme of equal size whose quality a format may require it to come close to; "": none.
        stock_since: oldest tested ComfyUI release whose own loaders open it; "": none.
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
        """Steps that map ``limit`` (any shape, ≥ 0) to the largest code; 1 for an all-zero weight."""

    @abstractmethod
    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """Nearest codes for ``x``, float32 in steps, any shape; ties to even, saturating."""

    @abstractmethod
    def widen(self, codes: torch.Tensor) -> torch.Tensor:
        """Values of codes, float32 in steps."""

    def steps(self, w: torch.Tensor, amax: float | None = None) -> Steps:
        """Steps of a finite weight [out, ...], on its device.

        Args:
            amax: clip limit; None: the largest magnitude each scale covers.
        """
        if self.granularity == TENSOR:
            return self.at(largest(w) if amax is None else amax, w.device)
        tops = largest_of_channels(w)
        return self.at(tops if amax is None else tops.clamp(max=amax), w.device)

    def at(self, limit: float | torch.Tensor, device: torch.device) -> Steps:
        """``limited``, with the result on ``device``."""
        steps = self.limited(limit)
        return Steps(steps.unit.to(device), None if steps.limit is None else steps.limit.to(device))

    def into(self, w: torch.Tensor, steps: Steps) -> torch.Tensor:
        """A weight, or a part of one, in steps, float32."""
        w = w.to(torch.float32)
        if steps.limit is not None:
            w = w.clamp(-steps.limit, steps.limit)
        return w / steps.unit if self.scaled else w

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest representable values, float32 in steps."""
        return self.widen(self.cast(x))

    def rounded(self, w: torch.Tensor, steps: Steps) -> torch.Tensor:
        """A weight, or a part of one, rounded to nearest and dequantized, float32."""
        values = self.nearest(self.into(w, steps))
        return values.mul_(steps.unit) if self.scaled else values

    def fake_quantize(self, w: torch.Tensor, amax: float | None = None) -> torch.Tensor:
        """``rounded`` for a whole weight, with the steps for this clip limit, see ``steps``."""
        return self.restored(self.nearest_tensors(w, amax))

    def nearest_tensors(self, w: torch.Tensor, amax: float | None = None) -> Tensors:
        """Stored tensors of a weight rounded to nearest, see ``steps`` and ``tensors``."""
        steps = self.steps(w, amax)
        codes = torch.empty(w.shape, dtype=self.dtype, device=w.device)
        flat, done = codes.flatten(), 0
        for piece, own in steps.pieces(w):
            flat[done : done + piece.numel()] = self.cast(self.into(piece, own)).flatten()
            done += piece.numel()
        return self.tensors(codes, steps)

    def tensors(self, codes: torch.Tensor, steps: Steps) -> Tensors:
        """Stored tensors for these codes, which have the weight's shape: {``CODES``: ..., ``SCALE``: ...}."""
        return {CODES: codes, SCALE: steps.unit} if self.scaled else {CODES: codes}

    def described(self, shape: tuple[int, ...]) -> Tensors:
        """``tensors`` of a weight of this shape, without data (on the meta device)."""
        unit = (shape[0], *[1] * (len(shape) - 1)) if self.granularity == CHANNEL else ()
        steps = Steps(torch.empty(unit, device="meta"))
        return self.tensors(torch.empty(shape, dtype=self.dtype, device="meta"), steps)

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight a loader reconstructs from ``tensors``, float32 in its own shape and basis."""
        values = self.widen(tensors[CODES])
        return values.mul_(by_channel(tensors[SCALE], values.dim())) if self.scaled else values

    def code_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the codes of a weight of this shape."""
        return math.prod(shape) * self.dtype.itemsize

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of this shape with its scales; a single scale is not counted (see ``budget``)."""
        return self.code_bytes(shape) + (4 * shape[0] if self.granularity == CHANNEL else 0)

    def activations(self, x: torch.Tensor, amax: float) -> torch.Tensor:  # noqa: ARG002 - for schemes that cast them
        """Inputs as a loader rounds them to multiply with codes, in their own dtype; ``amax``: their clip limit."""
        return x

    def marker(self, *, full_precision: bool) -> dict[str, object] | None:
        """The ``comfy_quant`` record; None if ComfyUI loads the layer without one.

        Args:
            full_precision: whether loaders must not quantize activations.
        """
        if not self.scaled:
            return None
        return {"format": self.number_format, "full_precision_matrix_mult": full_precision}
