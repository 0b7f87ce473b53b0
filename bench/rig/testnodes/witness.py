"""Two independent checks of calibration's sums: exact ones, in float64 throughout and without the pack's code, and
sums made here of single calls that are measured as the pack does.
"""

# ruff: noqa: D102 - names prescribed by ComfyUI

from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from rig import pack

pack.alias()
from hswq.hswq_core.calibration.observer import LayerObserver  # noqa: E402
from hswq.hswq_core.model.kinds import KINDS  # noqa: E402

CATEGORY = "HSWQ/rig"
PEAK = "peak"


class Witness:
    """Sums over calls, {"kind|layer|what": float64}; what: abs, mean [C_in]; out, squares, calls, peak []."""

    def __init__(self, path):
        self.path = path
        self.sums = {}

    def sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: write all sums at the end of each run."""
        try:
            return executor(*args, **kwargs)
        finally:
            np.savez(self.path, **self.sums)

    def apply(self, executor, *args, **kwargs):
        """APPLY_MODEL: hooks for one call."""
        modules = executor.class_obj.diffusion_model.named_modules()
        layers = {name: module for name, module in modules if type(module).__name__ in KINDS}
        handles = [module.register_forward_hook(self._hook(name)) for name, module in layers.items()]
        try:
            return executor(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name):
        def hook(module, args, output):
            self._add(f"exact|{name}", exact(module, args[0].double(), output.double()))
            self._add(f"calls|{name}", measured(name, module, args[0], output))

        return hook

    def _add(self, key, values):
        for what, value in values.items():
            before = self.sums.get(f"{key}|{what}", 0.0)
            now = np.asarray(value, dtype=np.float64)
            self.sums[f"{key}|{what}"] = np.maximum(before, now) if what == PEAK else before + now


def exact(module, x, y):
    """Measure one call in float64."""
    rows = x.flatten(0, -2) if type(module).__name__ == "Linear" else x.movedim(1, -1).flatten(0, -2)
    size = rows.abs()
    found = {"abs": size.mean(0), "mean": rows.mean(0), PEAK: size.max(), "out": y.mean(), "squares": y.square().mean()}
    return {**found, "calls": torch.ones(())}


def measured(name, module, x, y):
    """Measure one call as the pack does."""
    kind, shape = type(module).__name__, tuple(module.weight.shape)
    one = LayerObserver(name, kind, shape, x.shape[-1] if kind == "Linear" else x.shape[1])
    one.see_input(x)
    one.see_output(y)
    call = one.drain()
    found = {"abs": call.abs_sum, "mean": call.mean_sum, PEAK: call.input_amax}
    return {**found, "out": call.out_sum, "squares": call.out_sq_sum, "calls": call.in_calls}


class RigWitness(io.ComfyNode):
    """MODEL in, MODEL out; sums of its layers in ``output/<name>.npz``, over all runs of the process."""

    known = {}  # noqa: RUF012

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RigWitness",
            display_name="Rig Witness",
            category=CATEGORY,
            inputs=[io.Model.Input("model"), io.String.Input("name", default="witness")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, name):
        path = Path(folder_paths.get_output_directory()) / f"{name}.npz"
        witness = cls.known.setdefault(name, Witness(path))
        watched = model.clone()
        watched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "rig_witness", witness.sample)
        watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "rig_witness", witness.apply)
        return io.NodeOutput(watched)
