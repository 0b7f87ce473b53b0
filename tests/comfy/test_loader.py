"""HSWQ Loader and the stock loader in this process: which bits arrive, what stays FP8, what is refused."""

from __future__ import annotations

import pytest
import torch
from hswq.hswq_core import FLOAT8_E4M3FN, QUANTIZE, FileError, FileSource, format_named
from rig import tiny
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.comfy, pytest.mark.compat]

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(kind, format) -> (file, plan) made by the product's own path, from a calibrated MODEL."""
    made = {}
    folder = tmp_path_factory.mktemp("converted")

    def get(comfy, kind: str, name: str, keep_ratio: float = 0.25):
        key = (kind, name, keep_ratio)
        if key not in made:
            made[key] = _convert(comfy, folder, *key)
        return made[key]

    return get


def _convert(comfy, folder, kind, name, keep_ratio):
    import folder_paths
    from hswq.loader.calibrate import calibrated
    from hswq.loader.convert import Request, convert_model
    from hswq.loader.store import path_of

    folder_paths.set_output_directory(str(folder))
    model = comfy.load_model(tiny.make(kind))
    session = f"{kind}-{name}-{keep_ratio}"
    comfy.sample(calibrated(model, path_of(session), 50, lambda text: None))
    done, _ = convert_model(model, None, None, Request(session, name, "hswq", keep_ratio=keep_ratio), lambda *_: None)
    return done.path, done.plan


def opened(path):
    from hswq.loader.open import open_diffusion_model

    return open_diffusion_model(path)


def modules(model):
    from hswq.loader.model import layer_modules

    return layer_modules(model.model.diffusion_model)


def expected_weight(path, name: str) -> torch.Tensor:
    """Core's dequantize of what is in the file."""
    file = FileSource(path)
    prefix = PREFIX if any(key.startswith(PREFIX) for key in file.entries) else ""
    stem = f"{prefix}{name}."
    scale = next((file.read(stem + s) for s in ("scale", "weight_scale") if stem + s in file.entries), None)
    return FLOAT8_E4M3FN.dequantize(file.read(f"{stem}weight"), scale)


EVERY_FORMAT = [(kind, name) for kind in ("flux-tiny", "sd15-small") for name in ("v1", "v2", "comfy")]
BIG = [("sdxl-small", "v2"), pytest.param("zimage", "v2", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "name"), EVERY_FORMAT + BIG)
def test_weights_are_bit_equal_to_cores_and_stay_fp8(comfy, converted, kind, name):
    path, plan = converted(comfy, kind, name)
    layers = modules(opened(path))
    assert {layer.kind for layer in plan.layers if layer.action == QUANTIZE} >= {"Linear"}
    for layer in plan.layers:
        weight = layers[layer.name].weight
        if layer.action == QUANTIZE:
            assert weight._qdata.dtype == torch.float8_e4m3fn
            assert torch.equal(weight.dequantize(), expected_weight(path, layer.name))
        else:
            assert weight.dtype == torch.float16


def test_convolutions_are_fp8_too(comfy, converted):
    path, plan = converted(comfy, "sd15-small", "v2")
    layers = modules(opened(path))
    convolutions = [layer.name for layer in plan.layers if layer.kind == "Conv2d" and layer.action == QUANTIZE]
    assert len(convolutions) > 10
    assert all(layers[name].weight._qdata.dtype == torch.float8_e4m3fn for name in convolutions)


@pytest.mark.parametrize("kind", ["flux-tiny", "sd15-small"])
def test_output_equals_a_stock_model_of_the_dequantized_weights(comfy, converted, kind, tmp_path):
    path, plan = converted(comfy, kind, "v2")
    state = load_file(tiny.make(kind))
    prefix = PREFIX if any(key.startswith(PREFIX) for key in state) else ""
    for layer in plan.layers:
        if layer.action == QUANTIZE:
            state[f"{prefix}{layer.name}.weight"] = expected_weight(path, layer.name)
    save_file({key: tensor.float() for key, tensor in state.items()}, tmp_path / "dequantized.safetensors")
    ours = comfy.sample(opened(path), steps=3)
    stock = comfy.sample(comfy.load_model(tmp_path / "dequantized.safetensors"), steps=3)
    assert ours.isfinite().all()
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("kind", ["flux-tiny", "sd15-small"])
def test_kept_layers_of_the_comfy_format_stay_16_bit_in_the_stock_loader(comfy, converted, kind):
    path, plan = converted(comfy, kind, "comfy")
    layers = modules(comfy.load_model(path))
    for layer in plan.layers:
        weight = layers[layer.name].weight
        if layer.action == QUANTIZE and layer.scaled:
            assert torch.equal(weight.dequantize().float(), expected_weight(path, layer.name))
        elif layer.action != QUANTIZE:
            original = FileSource(path).read(_key(path, layer.name))
            assert original.dtype == torch.float16
            assert torch.equal(weight.float(), original.float())


def _key(path, name: str) -> str:
    entries = FileSource(path).entries
    return f"{PREFIX if any(key.startswith(PREFIX) for key in entries) else ''}{name}.weight"


def test_a_lora_is_merged_into_the_file_and_the_model_left_alone(comfy, converted, tmp_path):
    import folder_paths
    from comfy import sd, utils
    from hswq.loader.calibrate import calibrated
    from hswq.loader.convert import Request, convert_model
    from hswq.loader.model import original
    from hswq.loader.store import path_of

    folder_paths.set_output_directory(str(tmp_path))
    model = comfy.load_model(tiny.make("flux-tiny"))
    state = utils.load_torch_file(str(tiny.lora("flux-tiny")))
    patched, _ = sd.load_lora_for_models(model, None, state, 0.5, 0.0)
    parameter = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    before = original(model.get_key_patches(parameter)[parameter]).clone()
    comfy.sample(calibrated(patched, path_of("lora"), 50, lambda text: None))
    done, _ = convert_model(patched, None, None, Request("lora", "v2", "hswq", keep_ratio=1.0), lambda *_: None)
    assert done.plan.counts()["quantize"] == 0
    stem = "diffusion_model.double_blocks.0.img_attn.qkv.lora_"
    delta = state[f"{stem}up.weight"].float() @ state[f"{stem}down.weight"].float()
    alpha = state.get("diffusion_model.double_blocks.0.img_attn.qkv.alpha")
    rank = state[f"{stem}down.weight"].shape[0]
    delta *= 0.5 * (1.0 if alpha is None else alpha.item() / rank)
    written = FileSource(done.path).read(_key(done.path, "double_blocks.0.img_attn.qkv"))
    assert torch.equal(written, (before.float() + delta).to(written.dtype))
    assert torch.equal(original(model.get_key_patches(parameter)[parameter]), before)


def test_a_model_without_a_usable_file_is_written_as_comfyui_names_it(comfy, tmp_path):
    import folder_paths
    from hswq.loader.calibrate import calibrated
    from hswq.loader.convert import Request, convert_model
    from hswq.loader.store import path_of

    folder_paths.set_output_directory(str(tmp_path))
    model = comfy.load_model(tiny.make("flux-tiny"))
    model.cached_patcher_init = None
    comfy.sample(calibrated(model, path_of("memory"), 50, lambda text: None))
    done, _ = convert_model(model, None, None, Request("memory", "comfy", "hswq"), lambda *_: None)
    assert all(key.startswith(PREFIX) for key in FileSource(done.path).entries)
    assert comfy.sample(comfy.load_model(done.path)).isfinite().all()


def test_the_check_refuses_a_file_with_a_lost_scale(comfy, converted, tmp_path):
    from hswq.loader.verify import verify_file

    path, plan = converted(comfy, "flux-tiny", "comfy")
    state = load_file(path)
    victim = next(layer.name for layer in plan.layers if layer.scaled)
    del state[f"{victim}.comfy_quant" if f"{victim}.comfy_quant" in state else f"{PREFIX}{victim}.comfy_quant"]
    save_file(state, tmp_path / "lost.safetensors")
    verify_file(path, plan, format_named("comfy"))
    with pytest.raises(FileError, match=r"unexpected keys.*weight_scale"):
        verify_file(tmp_path / "lost.safetensors", plan, format_named("comfy"))


class TestKeys:
    """Which key is a scale, and which scale is none."""

    CODES = torch.ones(4, 8).to(torch.float8_e4m3fn)

    def normalize(self, **state):
        from hswq.loader.keys import normalize_keys

        return normalize_keys({key.replace("__", "."): tensor for key, tensor in state.items()}, "", "x.safetensors")

    @pytest.mark.parametrize("suffix", ["scale", "weight.scale", "scale_weight", "weight_scale"])
    @pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)])
    def test_every_spelling_of_a_scale(self, comfy, suffix, shape):
        state = self.normalize(**{"a__weight": self.CODES, f"a__{suffix}": torch.full(shape, 0.5)})
        assert set(state) == {"a.weight", "a.weight_scale"}

    def test_a_norms_scale_is_no_quantization_scale(self, comfy):
        state = self.normalize(norm__scale=torch.ones(8), a__weight=self.CODES)
        assert set(state) == {"norm.scale", "a.weight"}

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
    def test_an_unusable_scale_is_named(self, comfy, value):
        with pytest.raises(FileError, match=r"x\.safetensors, tensor a\.scale"):
            self.normalize(a__weight=self.CODES, a__scale=torch.tensor([value]))

    def test_a_scale_of_another_shape_is_named(self, comfy):
        with pytest.raises(FileError, match=r"a\.scale.*\(3,\)"):
            self.normalize(a__weight=self.CODES, a__scale=torch.ones(3))

    def test_two_scales_are_refused(self, comfy):
        with pytest.raises(FileError, match="second scale"):
            self.normalize(a__weight=self.CODES, a__scale=torch.ones(1), a__weight_scale=torch.ones(1))

    def test_a_scale_without_an_fp8_weight_is_refused(self, comfy):
        with pytest.raises(FileError, match="no FP8 weight"):
            self.normalize(a__weight=torch.ones(4, 8), a__weight_scale=torch.ones(1))


def test_a_file_without_fp8_is_refused(comfy):
    with pytest.raises(FileError, match="ComfyUI's own loader"):
        opened(tiny.make("flux-tiny"))


def test_statistics_of_the_predecessor_convert_and_go_on_growing(comfy, tmp_path):
    import folder_paths
    from hswq.hswq_core import load_session
    from hswq.loader.calibrate import calibrated
    from hswq.loader.convert import Request, convert_model
    from hswq.loader.store import path_of

    folder_paths.set_output_directory(str(tmp_path))
    model = comfy.load_model(tiny.make("flux-tiny"))
    layers = {}
    for name, module in modules(model).items():
        record = {"output_sum": 1.0, "output_sq_sum": 2.0, "out_count": 4, "in_count": 4}
        layers[name] = {**record, "input_imp_sum": torch.ones(module.in_features, dtype=torch.float64)}
    path_of("theirs").parent.mkdir()
    torch.save({"meta": {"type": "hswq_dual_monitor_v2"}, "layers": layers}, path_of("theirs"))
    done, _ = convert_model(model, None, None, Request("theirs", "v2", "hswq"), lambda *_: None)
    assert "_r4_" in done.path.name
    comfy.sample(calibrated(model, path_of("theirs"), 50, lambda text: None), steps=2, cfg=1.0)
    assert load_session(path_of("theirs")).calls == 6
