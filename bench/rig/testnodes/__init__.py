"""Test-only custom nodes: conditioning without text encoders, the reference models' captions and pictures,
trouble on demand, a hook counter.
"""

# ruff: noqa: D101, D102, D103, ARG003 - names prescribed by ComfyUI

import os
import sys
import time

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io, ui

sys.path.append(os.environ["HSWQ_BENCH"])

from reference_models.architectures import register
from reference_models.captions import embed
from reference_models.pictures import to_pictures

from .witness import RigWitness

CATEGORY = "HSWQ/rig"


class RigConditioning(io.ComfyNode):
    """Random CONDITIONING of any width, for models whose text encoders are too big for a test."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RigConditioning",
            display_name="Rig Conditioning",
            category=CATEGORY,
            inputs=[
                io.Int.Input("tokens", default=8, min=1, max=4096),
                io.Int.Input("width", default=768, min=1, max=65536),
                io.Int.Input("pooled_width", default=0, min=0, max=65536, tooltip="0: none"),
                io.Int.Input("seed", default=0, min=0, max=2**31, control_after_generate=True),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, tokens, width, pooled_width, seed):
        rng = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, width, generator=rng)
        extra = {"pooled_output": torch.randn(1, pooled_width, generator=rng)} if pooled_width else {}
        return io.NodeOutput([[context, extra]])


class RigCaption(io.ComfyNode):
    """CONDITIONING for a reference model's caption; empty: the unconditional one."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RigCaption",
            display_name="Rig Caption",
            category=CATEGORY,
            inputs=[io.String.Input("caption", default="a large red circle top left on plain blue")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, caption):
        tokens, pooled = embed([caption])
        return io.NodeOutput([[tokens, {"pooled_output": pooled}]])


class RigPicture(io.ComfyNode):
    """IMAGE from a reference model's latent."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RigPicture",
            display_name="Rig Picture",
            category=CATEGORY,
            inputs=[io.Latent.Input("samples")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples):
        return io.NodeOutput(to_pictures(samples["samples"].float().cpu()).movedim(1, -1))


class RigTrouble(io.ComfyNode):
    """From the n-th model call on, raises or sleeps before every call."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RigTrouble",
            display_name="Rig Trouble",
            category=CATEGORY,
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("mode", options=["raise", "slow"]),
                io.Int.Input("at", default=1, min=1, max=10**6, tooltip="model call, from 1"),
                io.Float.Input("seconds", default=0.5, min=0.0, max=60.0, step=0.1),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, mode, at, seconds):
        calls = 0

        def apply(executor, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= at and mode == "raise":
                raise RuntimeError(f"rig trouble in model call {calls}")
            if calls >= at:
                time.sleep(seconds)
            return executor(*args, **kwargs)

        troubled = model.clone()
        troubled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "rig_trouble", apply)
        return io.NodeOutput(troubled)


class RigHooks(io.ComfyNode):
    """Shows as text how many forward hooks are registered on the currently loaded diffusion models.

    Without an input it runs at once; link `after` to run it after another node.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RigHooks",
            display_name="Rig Hooks",
            category=CATEGORY,
            is_output_node=True,
            inputs=[io.AnyType.Input("after", optional=True)],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        return time.time()

    @classmethod
    def execute(cls, after=None):
        models = [_diffusion_model(loaded) for loaded in _loaded()]
        hooks = sum(_hooks(model) for model in models if model is not None)
        return io.NodeOutput(ui=ui.PreviewText(str(hooks)))


def _loaded():
    return [loaded.model for loaded in comfy.model_management.current_loaded_models if loaded.model]


def _diffusion_model(patcher):
    return getattr(patcher.model, "diffusion_model", None)


def _hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class RigExtension(ComfyExtension):
    async def get_node_list(self):
        return [RigConditioning, RigCaption, RigPicture, RigTrouble, RigHooks, RigWitness]


async def comfy_entrypoint():
    register()
    return RigExtension()
