"""How the reference UNet starts: as the identity, through channel groups whose content its last norm cannot remove.

At the highest sigma the noise to be predicted is the input, and sampling multiplies any error in it by the sigma.
SDXL's last GroupNorm has ten channels per group and hardly affects it; in a narrow UNet the group's mean and deviation
are the channel's own, and removing them removes the picture's colour. A group (n, -n, K) with a constant K keeps both:
its mean is K / 3 for any n, and its deviation is nearly that of the constant. After the norm, with the mean added back
as its bias, SiLU(z) - SiLU(-z) = z recovers n. The other groups get the constant too, so that what the network adds to
the noise keeps its size: it must shrink with the sigma.
"""

from __future__ import annotations

import math
from typing import Any

import torch

GROUPS = 32  # in every GroupNorm of ComfyUI's UNet
CONSTANT = 4.0


def start_as_identity(unet: Any) -> None:
    """Carry each input channel in its own group, and a constant in every group, from the first layer to the last norm.

    Args:
        unet: has three channels per group, and at most as many input channels as groups.
    """
    first, last = unet.input_blocks[0][0], unet.output_blocks[-1][0].skip_connection
    norm, out = unet.out[0], unet.out[2]
    width, inputs = first.weight.shape[:2]
    if width != 3 * GROUPS or inputs > GROUPS:
        raise ValueError(f"{width} channels for {inputs} inputs: expected {3 * GROUPS} for at most {GROUPS}")
    # of (n - K/3, -n - K/3, 2K/3) for n with unit variance
    deviation = math.sqrt((2 + 6 * (CONSTANT / 3) ** 2) / 3)
    with torch.no_grad():
        carried = [*range(3 * inputs), *range(3 * inputs + 2, width, 3)]
        for layer in (first, last):
            layer.weight[carried] = 0
            layer.bias[carried] = 0
        first.bias[2::3] = CONSTANT
        for index in carried:
            last.weight[index, last.weight.shape[1] - width + index] = 1
        for channel in range(inputs):
            plus, minus = 3 * channel, 3 * channel + 1
            first.weight[plus, channel, 1, 1] = 1
            first.weight[minus, channel, 1, 1] = -1
            norm.bias[[plus, minus]] = CONSTANT / 3 / deviation
            out.weight[channel, plus, 1, 1] = deviation
            out.weight[channel, minus, 1, 1] = -deviation
