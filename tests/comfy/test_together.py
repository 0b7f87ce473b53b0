"""HSWQ Loader's MODEL with ComfyUI's other features: the same pictures as a stock model with the same weights."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hswq.hswq_core.errors import LayerError
from rig import tiny
from rig.environment import child_environment
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

EXTRAS = "comfy_extras.nodes_"
NODES = {
    "HyperTile": ("hypertile", {"tile_size": 32, "swap_size": 2, "max_depth": 1, "scale_depth": False}),
    "PatchModelAddDownscale": (
        "model_downscale",
        {
            "block_number": 1,
            "downscale_factor": 2.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
            "downscale_after_skip": True,
            "downscale_method": "bicubic",
            "upscale_method": "bicubic",
        },
    ),
    "PerturbedAttentionGuidance": ("pag", {"scale": 3.0}),
    "SelfAttentionGuidance": ("sag", {"scale": 0.5, "blur_sigma": 2.0}),
    "TomePatchModel": ("tomesd", {"ratio": 0.3}),
    "RescaleCFG": ("model_advanced", {"multiplier": 0.7}),
    "ModelComputeDtype": ("model_advanced", {"dtype": "bf16"}),
}


@pytest.fixture
def pair(comfy, made):
    """(HSWQ Loader's MODEL, the stock loader's with the same weights)."""
    file = made(comfy, "sd15-small", "v2")
    return file.open(), file.open_twin()


def draw(comfy, model):
    return comfy.sample(model, steps=2, size=16)


def same_effect(comfy, pair, change) -> None:
    """``change`` has an effect, and the same one on both models."""
    ours, twin = (draw(comfy, change(model)) for model in pair)
    assert torch.equal(ours, twin)
    assert not torch.equal(twin, draw(comfy, pair[1]))


@pytest.mark.compat
@pytest.mark.parametrize("name", NODES)
def test_model_patches(comfy, pair, tools, name):
    module, inputs = NODES[name]
    same_effect(comfy, pair, lambda model: tools.run_node(EXTRAS + module, name, model=model, **inputs))


@pytest.mark.slow
def test_free_u_on_a_whole_sd15(comfy, made, tools):
    file = made(comfy, "sd15", "v2")
    inputs = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
    same_effect(
        comfy,
        (file.open(), file.open_twin()),
        lambda model: tools.run_node(f"{EXTRAS}freelunch", "FreeU_V2", model=model, **inputs),
    )


@pytest.mark.compat
def test_attention_replaced_as_image_prompt_adapters_do(comfy, pair):
    from comfy.ldm.modules.attention import optimized_attention

    def adapter(model):
        def attention(q, k, v, extra):
            own = optimized_attention(q, k, v, extra["n_heads"])
            return own + 0.5 * optimized_attention(q, k.roll(1, 1), v.roll(1, 1), extra["n_heads"])

        patched = model.clone()
        patched.set_model_attn2_replace(attention, "input", 1)
        patched.set_model_attn1_patch(lambda q, k, v, _extra: (q * 1.1, k, v))
        return patched

    same_effect(comfy, pair, adapter)


@pytest.mark.compat
def test_control_net(comfy, pair, tmp_path):
    import comfy.ops as operations
    from comfy import controlnet
    from comfy.cldm import cldm

    settings = dict(pair[1].model.model_config.unet_config)
    settings.pop("out_channels", None)
    settings |= {"hint_channels": 3, "dtype": torch.float32, "device": "cpu"}
    net = cldm.ControlNet(**settings, operations=operations.disable_weight_init)
    torch.manual_seed(1)
    state = {key: torch.randn_like(tensor) * 0.02 for key, tensor in net.state_dict().items()}
    save_file(state, tmp_path / "control.safetensors")
    control = controlnet.load_controlnet(str(tmp_path / "control.safetensors"))
    hint = torch.rand(1, 3, 128, 128)
    drawn = [comfy.sample(m, steps=2, size=16, control=control.copy().set_cond_hint(hint, 1.0)) for m in pair]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[1], draw(comfy, pair[1]))


@pytest.mark.compat
def test_lora_hooks_on_a_prompt(comfy, made):
    from comfy import hooks

    file = made(comfy, "flux-tiny", "v2")
    lora = load_file(tiny.lora("flux-tiny", layers=file.quantized))
    ours, twin = file.open(), file.open_twin()
    plain = comfy.sample(ours)
    effects = []
    for model in (ours, twin):
        group = hooks.create_hook_lora(lora, 1.0, 0.0)
        effects.append(comfy.sample(model, hooks=group) - comfy.sample(model))
    assert (effects[0] - effects[1]).norm() < 0.5 * effects[1].norm()
    assert torch.equal(comfy.sample(ours), plain)


@pytest.mark.compat
def test_compiled(comfy, made, tools):
    if not sys.platform.startswith("linux"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    file = made(comfy, "flux-tiny", "v2")
    model = file.open()
    compiled = tools.run_node(f"{EXTRAS}torch_compile", "TorchCompileModel", model=model, backend="inductor")
    wanted = comfy.sample(model)
    assert (comfy.sample(compiled) - wanted).norm() < 1e-3 * wanted.norm()
    assert torch.equal(comfy.sample(model), wanted)


@pytest.mark.compat
def test_two_models_at_once(comfy, made):
    first, second = made(comfy, "flux-tiny", "v2"), made(comfy, "sd15-small", "v2")
    alone = [comfy.sample(file.open()) for file in (first, second)]
    one, two = first.open(), second.open()
    for _ in range(2):
        assert torch.equal(comfy.sample(one), alone[0])
        assert torch.equal(comfy.sample(two), alone[1])


@pytest.mark.compat
def test_the_same_file_opened_twice(comfy, made):
    file = made(comfy, "flux-tiny", "v2")
    wanted = comfy.sample(file.open())
    one, two = file.open(), file.open()
    assert torch.equal(comfy.sample(one), wanted)
    assert torch.equal(comfy.sample(two), wanted)


@pytest.mark.compat
def test_calibration_is_refused_with_the_reason(comfy, made, tmp_path):
    from hswq.loader.calibration.model import calibrated

    model = made(comfy, "flux-tiny", "v2").open()
    with pytest.raises(LayerError, match=r"already quantized.*Load the original FP16/BF16 file"):
        calibrated(model, tmp_path / "fp8.pt", 50, lambda text: None)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.compat), "float16"])
def test_dequantize_dtype(comfy, made, dtype):
    file = made(comfy, "flux-tiny", "v2")
    model = file.open(dequantize_dtype=dtype)
    seen = set()
    model.model.diffusion_model.double_blocks[0].img_attn.proj.register_forward_hook(
        lambda _module, _inputs, output: seen.add(output.dtype)
    )
    drawn, wanted = comfy.sample(model), comfy.sample(file.open())
    assert seen == {getattr(torch, dtype)}
    assert (drawn - wanted).norm() < {"float32": 1e-6, "float16": 0.02, "bfloat16": 0.1}[dtype] * wanted.norm()


@pytest.mark.compat
class TestFp8Matmul:
    """Layers marked in a comfy file multiply in FP8, bit for bit as with ComfyUI's own loader."""

    @pytest.fixture
    def fast(self, comfy, made):
        return made(comfy, "flux-tiny", "comfy", method="model_aware", fast_matmul=100.0)

    def test_equals_the_stock_loader(self, comfy, fast, fp8_compute):
        assert any(layer.input_amax for layer in fast.plan.layers)
        ours, stock = comfy.sample(fast.open()), comfy.sample(comfy.load_model(fast.path))
        assert torch.equal(ours, stock)
        assert not torch.equal(ours, comfy.sample(fast.open(fp8_matmul=False)))

    def test_off_equals_the_dequantized_weights(self, comfy, fast, fp8_compute):
        assert torch.equal(comfy.sample(fast.open(fp8_matmul=False)), comfy.sample(fast.open_twin()))

    def test_a_device_without_it_takes_the_long_way(self, comfy, fast):
        assert torch.equal(comfy.sample(fast.open()), comfy.sample(fast.open_twin()))

    def test_it_survives_a_save_node(self, comfy, fast, tools, fp8_compute, tmp_path):
        from comfy import sd

        sd.save_checkpoint(str(tmp_path / "saved.safetensors"), fast.open())
        assert torch.equal(comfy.sample(tools.opened(tmp_path / "saved.safetensors")), comfy.sample(fast.open()))


SWITCHES = [
    pytest.param(["--fp8_e4m3fn-unet"], marks=pytest.mark.compat),
    ["--fp8_e5m2-unet"],
    ["--fp16-unet"],
    ["--bf16-unet"],
    ["--fp32-unet"],
    pytest.param(["--force-fp16"], marks=pytest.mark.compat),
    pytest.param(["--fast"], marks=pytest.mark.compat),
    pytest.param(["--deterministic", "--disable-smart-memory"], marks=pytest.mark.compat),
]
SCRIPT = """
import sys
from rig import inprocess, pack
inprocess.load_comfy(sys.argv[2:])
pack.alias()
import torch
from pathlib import Path
with torch.inference_mode():
    model = inprocess.open_fp8(Path(sys.argv[1]))
    drawn = inprocess.sample(model)
    kept = {str(m.weight.dtype) for m in model.model.diffusion_model.modules() if type(m).__name__ == "Linear"
            and not m.layout_type}
print(drawn.double().norm().item(), drawn.isfinite().all().item(), *kept)
"""


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: switches[0])
def test_command_line_switches(comfy, made, switches, threads):
    """FP8 weights stay as in the file, and kept layers stay 16-bit, regardless of command-line switches."""
    file = made(comfy, "flux-tiny", "v2")
    environment = child_environment(threads) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(file.path), *switches]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    norm, finite, *kept = done.stdout.split("\n")[-2].split()
    assert finite == "True"
    assert kept == ["torch.float16"]
    assert float(norm) == pytest.approx(comfy.sample(file.open()).double().norm().item(), rel=1e-2)
