"""Importance of input channels, laid over a weight. Strict: a wrong length is an error, never padded."""

from __future__ import annotations

import torch

from .errors import LayerError


def importance_over_weight(name: str, shape: tuple[int, ...], importance: torch.Tensor) -> torch.Tensor:
    """Broadcast a per-input-channel vector over a weight.

    Args:
        name: layer name, for the message.
        shape: weight shape, [out, in] or [out, in / groups, kh, kw].
        importance: [C_in], C_in = in (all groups together).

    Returns:
        float32 [1, in, 1...] or, for a grouped convolution, [out, in / groups, 1, 1].

    Raises:
        LayerError: wrong length, negative or non-finite values.
    """
    out_channels, per_group = shape[0], shape[1]
    channels = importance.numel()
    groups, rest = divmod(channels, per_group)
    is_linear = len(shape) == 2
    wrong = rest or groups == 0 or out_channels % max(groups, 1) or (is_linear and groups != 1)
    if importance.dim() != 1 or wrong:
        raise LayerError(
            f"Layer {name}, importance",
            got=f"{tuple(importance.shape)} values",
            expected=f"{per_group} per group of a weight of shape {shape}",
            remedy="The session does not belong to this model; calibrate again under a new session name.",
        )
    if not bool(importance.isfinite().all()) or bool((importance < 0).any()):
        raise LayerError(
            f"Layer {name}, importance",
            got="negative or non-finite values",
            expected="finite values ≥ 0",
            remedy="The session is damaged; calibrate again under a new session name.",
        )
    tail = (1,) * (len(shape) - 2)
    if groups == 1:
        return importance.float().view(1, per_group, *tail)
    rows = importance.float().view(groups, per_group).repeat_interleave(out_channels // groups, dim=0)
    return rows.view(out_channels, per_group, *tail)
