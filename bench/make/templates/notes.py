"""Text of the note beside each graph."""

from __future__ import annotations

CALIBRATE = """## Calibrate and convert

1. Choose your FP16/BF16 model. Press **Run**: the picture is drawn as always, *HSWQ Calibration* records what
   every layer sees, and *HSWQ Converter* then writes the FP8 file.
2. Press **R** so that the loaders list the new file, and open it: **comfy** in the stock loader or in
   *HSWQ Loader* (template "load"), **v2** and **v1** in *HSWQ Loader*.
3. A better file: many prompts, by the template "calibrate over prompts". Or bypass *HSWQ Converter* (select it,
   Ctrl+B), run a few different prompts and switch it on again: runs of the same session name add up, also after a
   restart.

Statistics: `output/hswq_stats/`. File: `{folder}`."""

LOAD = """## Load

Choose the file, press **Run**. The name in the loader is the one that one Run of "calibrate and convert" writes.

The FP8 weights stay FP8 in memory, convolutions too; the layers that were kept stay FP16.
LoRAs go behind the loader as usual. Files of the **comfy** format also open in ComfyUI's own loader."""

COMPARE = """## Compare FP16 and FP8

1. Choose your FP16/BF16 model in the upper loader and its converted file in the HSWQ loader below it.
2. Press **Run**: both draw the same prompt from the same noise. *HSWQ Compare* shows what has
   changed, in numbers and enlarged; in the *Preview Image* behind it flip from one picture to the other.

Prompts are encoded once, by the upper loader's text encoder, so all that differs is the diffusion model.
*Seed* is that of both; another seed, another pair. Judge by several pairs: single pictures vary a lot.
Both models are opened: where memory is short, ComfyUI moves one out while the other draws."""

OVER_PROMPTS = """## Calibrate over many prompts

1. Choose your FP16/BF16 model. Set the batch count, the number beside **Run**, to **32** and press **Run**.
   Each picture gets the next of 128 varied prompts and a noise of its own; the statistics add up.
2. Then select *HSWQ Converter*, press **Ctrl+B** to switch it on, set the batch count back to 1 and press **Run**:
   the FP8 file is in `{folder}`.

Prompts of your own kind are better still: paste them into *HSWQ Calibration Prompts*, one a line.
Stopped halfway? Press **Run** again, it goes on with the next prompt. For another model choose another session name,
in both nodes, and set `index` to 0. Other families: put *HSWQ Calibration Prompts* into their template, `prompt` to
the text encoder, `seed` to the sampler."""

TEXT_ENCODER = """## Convert a text encoder

1. Choose the FP16/BF16 file (from `models/text_encoders`), press **Run**. `encoder_only` leaves out what no image
   model uses of T5; choose `auto` for other text encoders.
2. Press **R** so that the loaders list the new file, which is in `output/clip/`.
3. Open it in ComfyUI's own **Load CLIP** or **DualCLIPLoader** in the place of the old one.

No calibration is needed. `learned` instead of `nearest` fits the rounding to each weight: it takes minutes and
gains a little."""
