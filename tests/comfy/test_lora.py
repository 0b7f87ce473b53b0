"""LoRAs on a model opened by HSWQ Loader: exact ones to float32 precision, stock ones as ComfyUI applies them."""

from __future__ import annotations

import pytest
import torch
from rig import tiny
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy

KINDS = [pytest.param("flux-tiny", marks=pytest.mark.compat), "sd15-small"]
RANK = 4


def add(model, lora, strength: float = 1.0):
    from comfy import sd

    return sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def lora_of(made, layers: list[str], seed: int = 0):
    kind = "flux-tiny" if "double_blocks.0.img_attn.qkv" in [layer.name for layer in made.plan.layers] else "sd15-small"
    return load_file(tiny.lora(kind, layers=layers, seed=seed))


def bits(model, tools) -> dict[str, torch.Tensor]:
    """All stored bytes of the layers' weights and scales."""
    found = {}
    for name, module in tools.modules(model).items():
        weight = module.weight
        tensors = weight.state_dict(name) if getattr(module, "layout_type", None) else {name: weight}
        found |= {key: tensor.detach().reshape(-1).view(torch.uint8).clone() for key, tensor in tensors.items()}
    return found


def close(found: torch.Tensor, wanted: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether a LoRA has the wanted effect, up to the order of float32 sums, which a random model amplifies."""
    return bool((found - wanted).norm() < 1e-4 * (wanted - plain).norm())


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", ["flux-tiny", "sd15-small"])
@pytest.mark.parametrize("name", ["v1", pytest.param("v2", marks=pytest.mark.compat), "comfy"])
def test_exact_equals_the_lora_on_the_dequantized_weights(comfy, made, kind, name):
    file = made(comfy, kind, name)
    lora = lora_of(file, file.quantized)  # Linears and convolutions
    ours, twin = file.open(), file.open_twin()
    plain = comfy.sample(ours)
    for strength in (1.0, -0.7):
        assert close(comfy.sample(add(ours, lora, strength)), comfy.sample(add(twin, lora, strength)), plain)


@pytest.mark.compat
def test_exact_with_a_scale_for_each_channel(comfy, made):
    file = made(comfy, "sd15-small", "v2", method="model_aware", scale_per="channel")
    assert file.plan.granularity == "channel"
    lora = lora_of(file, file.quantized)
    ours, twin = file.open(), file.open_twin()
    assert close(comfy.sample(add(ours, lora)), comfy.sample(add(twin, lora)), comfy.sample(ours))


@pytest.mark.compat
def test_two_loras_add_up_and_strength_0_is_none(comfy, made):
    file = made(comfy, "flux-tiny", "v2")
    first, second = (lora_of(file, file.quantized, seed) for seed in (1, 2))
    ours, twin = file.open(), file.open_twin()
    plain = comfy.sample(ours)
    both = [comfy.sample(add(add(model, first, 0.8), second, 0.4)) for model in (ours, twin)]
    assert close(*both, plain)
    assert torch.equal(comfy.sample(add(ours, first, 0.0)), plain)


@pytest.mark.compat
def test_the_effective_weight_is_the_sum_to_the_last_digits(comfy, made, tools):
    import comfy.ops as operations

    file = made(comfy, "flux-tiny", "v2")
    lora = lora_of(file, file.quantized)
    ours = add(file.open(), lora)
    comfy.sample(ours, steps=1)
    for name in file.quantized:
        module = tools.modules(ours)[name]
        x = torch.zeros(1, module.in_features)
        weight, _, stream = operations.cast_bias_weight(module, x, offloadable=True, compute_dtype=x.dtype)
        operations.uncast_bias_weight(module, weight, None, stream)
        stem = f"diffusion_model.{name}."
        up, down = (lora[f"{stem}lora_{side}.weight"].double() for side in ("up", "down"))
        change = up @ down * (lora[f"{stem}alpha"].item() / RANK)
        error = (weight.double() - file.weight(name).double() - change).norm() / change.norm()
        assert error < 1e-6


@pytest.mark.compat
def test_a_lora_on_kept_layers_is_merged_as_in_any_16_bit_model(comfy, made):
    file = made(comfy, "flux-tiny", "v2")
    kept = [layer.name for layer in file.plan.layers if layer.action == "keep" and len(layer.shape) == 2]
    lora = lora_of(file, kept)
    ours, twin = file.open(), file.open_twin()
    effect = comfy.sample(add(ours, lora)) - comfy.sample(ours)
    wanted = comfy.sample(add(twin, lora)) - comfy.sample(twin)
    assert (effect - wanted).norm() < 5e-3 * wanted.norm()  # float16 has 11 bits


@pytest.mark.compat
@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_other_adapters(comfy, made, algorithm):
    file = made(comfy, "flux-tiny", "v2")
    shapes = {layer.name: layer.shape for layer in file.plan.layers}
    lora = {}
    for name in file.quantized:
        out, width = shapes[name]
        stem = f"diffusion_model.{name}."
        if algorithm == "loha":
            for part in ("hada_w1", "hada_w2"):
                lora[f"{stem}{part}_a"] = torch.randn(out, RANK) * 0.2
                lora[f"{stem}{part}_b"] = torch.randn(RANK, width) * 0.2
        else:
            lora[f"{stem}lokr_w1"] = torch.randn(4, 4) * 0.05
            lora[f"{stem}lokr_w2"] = torch.randn(out // 4, width // 4) * 0.5
    ours, twin = file.open(), file.open_twin()
    changed = comfy.sample(add(ours, lora))
    assert torch.equal(changed, comfy.sample(add(twin, lora)))
    assert not torch.equal(changed, comfy.sample(ours))


@pytest.mark.parametrize("mode", ["exact", "stock"])
@pytest.mark.parametrize("kind", KINDS)
def test_taking_the_lora_off_restores_every_byte(comfy, made, tools, kind, mode):
    from comfy import model_management

    file = made(comfy, kind, "v2")
    model = file.open(lora=mode)
    before, plain = bits(model, tools), comfy.sample(model)
    patched = add(model, lora_of(file, file.quantized))
    assert not torch.equal(comfy.sample(patched), plain)
    assert torch.equal(comfy.sample(model), plain)  # the clone without the LoRA takes over
    assert same(before, bits(model, tools))
    comfy.sample(patched)
    model_management.unload_all_models()
    assert same(before, bits(model, tools))


@pytest.mark.parametrize("kind", KINDS)
def test_stock_mode_is_what_comfyui_does(comfy, made, tools, kind):
    file = made(comfy, kind, "v2")
    lora = lora_of(file, file.quantized)
    stock, exact = comfy.sample(add(file.open(lora="stock"), lora)), comfy.sample(add(file.open(), lora))
    effect = exact - comfy.sample(file.open())
    error = (stock - exact).norm() / effect.norm()
    assert 0.01 < error < 0.5  # only the noise of rounding a patched weight to FP8 stochastically


@pytest.mark.parametrize("kind", KINDS)
def test_exact_at_every_degree_of_loading(comfy, made, kind):
    """Partially loaded into VRAM, then more, then less, then nothing: the same output to the last bit."""
    cpu = torch.device("cpu")
    file = made(comfy, kind, "v2")
    model = add(file.open(), lora_of(file, file.quantized))
    size = model.model_size()
    model.partially_load(cpu)
    wanted = comfy.call(model)
    model.unpatch_model(cpu)
    model.partially_load(cpu, extra_memory=size // 3)
    assert model.model.model_lowvram
    assert torch.equal(comfy.call(model), wanted)
    model.partially_load(cpu, extra_memory=size // 3)
    assert torch.equal(comfy.call(model), wanted)
    model.partially_unload(cpu, memory_to_free=size // 3)
    assert torch.equal(comfy.call(model), wanted)
    model.partially_unload(cpu, memory_to_free=size * 2)
    assert torch.equal(comfy.call(model), wanted)
    model.unpatch_model(cpu)
    twin = add(file.open_twin(), lora_of(file, file.quantized))
    twin.partially_load(cpu)
    patched = comfy.call(twin)
    twin.unpatch_model(cpu)
    assert close(wanted, patched, comfy.call(twin))


@pytest.mark.parametrize("mode", ["exact", "stock"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_node_writes_the_lora_and_leaves_the_model_alone(comfy, made, tools, kind, mode, tmp_path):
    from comfy import sd

    file = made(comfy, kind, "v2")
    model = file.open(lora=mode)
    before = bits(model, tools)
    patched = add(model, lora_of(file, file.quantized))
    sd.save_checkpoint(str(tmp_path / "saved.safetensors"), patched)
    drawn, plain = comfy.sample(patched), comfy.sample(model)
    assert same(before, bits(model, tools))
    again = comfy.sample(tools.opened(tmp_path / "saved.safetensors"))
    if mode == "stock":
        assert torch.equal(again, drawn)
    else:
        assert (again - drawn).norm() < 0.5 * (drawn - plain).norm()
        wanted = comfy.sample(add(file.open_twin(), lora_of(file, file.quantized)))
        assert close(drawn, wanted, plain)


@pytest.mark.compat
def test_a_saved_model_opens_again_to_the_same_bits(comfy, made, tools, tmp_path):
    from comfy import sd

    file = made(comfy, "sd15-small", "v2")
    model = file.open()
    sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    assert torch.equal(comfy.sample(tools.opened(tmp_path / "saved.safetensors")), comfy.sample(model))


@pytest.mark.compat
def test_merging_models_goes_comfyuis_way(comfy, made, tools):
    file = made(comfy, "sd15-small", "v2")
    other = comfy.load_model(tiny.make("sd15-small", seed=1))
    merge = {"module": "comfy_extras.nodes_model_merging", "name": "ModelMergeSimple", "ratio": 0.5}
    ours, twin = file.open(), file.open_twin()
    merged, wanted = (comfy.sample(tools.run_node(model1=m, model2=other, **merge)) for m in (ours, twin))
    assert (merged - wanted).norm() < 0.5 * (wanted - comfy.sample(twin)).norm()
    from_ours, from_twin = (comfy.sample(tools.run_node(model1=other, model2=m, **merge)) for m in (ours, twin))
    assert (from_ours - from_twin).norm() < 5e-3 * from_twin.norm()
    stock = comfy.sample(tools.run_node(model1=file.open(lora="stock"), model2=other, **merge))
    assert torch.equal(merged, stock)
