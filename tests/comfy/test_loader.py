"""HSWQ Loader and the stock loader in this process: which bits are loaded, what stays FP8, what is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hswq.hswq_core.errors import FileError, SettingError
from hswq.hswq_core.files.checkpoint import FileSource
from hswq.hswq_core.plan.formats import format_named
from hswq.hswq_core.plan.plan import QUANTIZE
from rig import tiny
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

PREFIX = "model.diffusion_model."
# Linear layers in every format, convolutions in one.
EVERY_FORMAT = [pytest.param("flux-tiny", name, marks=pytest.mark.compat) for name in ("v1", "v2", "comfy")]
EVERY_FORMAT += [pytest.param("sd15-small", "v2", marks=pytest.mark.compat)]
EVERY_FORMAT += [("sd15-small", "v1"), ("sd15-small", "comfy")]
BIG = [("sdxl-small", "v2"), pytest.param("zimage", "v2", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "name"), EVERY_FORMAT + BIG)
def test_weights_are_bit_equal_to_cores_and_stay_fp8(comfy, made, tools, kind, name):
    file = made(comfy, kind, name)
    layers = tools.modules(file.open())
    assert {layer.kind for layer in file.plan.layers if layer.action == QUANTIZE} >= {"Linear"}
    for layer in file.plan.layers:
        weight = layers[layer.name].weight
        if layer.action == QUANTIZE:
            assert weight._qdata.dtype == torch.float8_e4m3fn
            assert torch.equal(weight.to(torch.float32).dequantize(), file.weight(layer.name))
        else:
            assert weight.dtype == torch.float16


@pytest.mark.compat
def test_convolutions_are_fp8_too(comfy, made, tools):
    file = made(comfy, "sd15-small", "v2")
    layers = tools.modules(file.open())
    convolutions = [layer.name for layer in file.plan.layers if layer.kind == "Conv2d" and layer.action == QUANTIZE]
    assert len(convolutions) > 10
    assert all(layers[name].weight._qdata.dtype == torch.float8_e4m3fn for name in convolutions)


@pytest.mark.parametrize(("kind", "name"), EVERY_FORMAT)
def test_output_equals_a_stock_model_of_the_dequantized_weights(comfy, made, kind, name):
    file = made(comfy, kind, name)
    ours, stock = comfy.sample(file.open(), steps=3), comfy.sample(file.open_twin(), steps=3)
    assert ours.isfinite().all()
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("kind", [pytest.param("flux-tiny", marks=pytest.mark.compat), "sd15-small"])
def test_kept_layers_of_the_comfy_format_stay_16_bit_in_the_stock_loader(comfy, made, tools, kind):
    file = made(comfy, kind, "comfy")
    layers = tools.modules(comfy.load_model(file.path))
    for layer in file.plan.layers:
        weight = layers[layer.name].weight
        if layer.action == QUANTIZE and layer.scaled:
            assert torch.equal(weight.dequantize().float(), file.weight(layer.name))
        elif layer.action != QUANTIZE:
            original = file.source.read(f"{file.prefix}{layer.name}.weight")
            assert original.dtype == torch.float16
            assert torch.equal(weight.float(), original.float())


def renamed(file, path, suffix: str, shape: tuple[int, ...], **more: torch.Tensor):
    """The file as other tools write it: different names and shapes of the scales, without our header."""
    state = load_file(file.path)
    for name in file.quantized:
        stem = f"{file.prefix}{name}."
        state[f"{stem}{suffix}"] = state.pop(f"{stem}scale").reshape(shape)
    save_file(state | {f"{file.prefix}{key}": tensor for key, tensor in more.items()}, path)
    return path


@pytest.mark.parametrize(
    ("suffix", "shape", "more"),
    [
        ("scale", (), {}),
        ("weight.scale", (1,), {}),
        ("weight.scale", (), {}),
        ("weight_scale", (), {}),
        ("scale_weight", (1,), {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["flux-tiny", "sd15-small"])
def test_scales_as_others_spell_them(comfy, made, tools, tmp_path, kind, suffix, shape, more):
    file = made(comfy, kind, "v2")
    theirs = tools.opened(renamed(file, tmp_path / "theirs.safetensors", suffix, shape, **more))
    assert torch.equal(comfy.sample(theirs), comfy.sample(file.open()))


@pytest.mark.compat
def test_one_scale_for_each_channel(comfy, made):
    file = made(comfy, "sd15-small", "v2", method="model_aware", scale_per="channel")
    scales = [file.source.entries[f"{file.prefix}{name}.scale"].shape for name in file.quantized]
    assert max(shape[0] for shape in scales) > 1
    assert torch.equal(comfy.sample(file.open()), comfy.sample(file.open_twin()))


@pytest.mark.compat
def test_a_lora_is_merged_into_the_file_and_the_model_left_alone(comfy, tmp_path):
    import folder_paths
    from comfy import sd, utils
    from hswq.loader.calibration.model import calibrated
    from hswq.loader.convert.model import Request, convert_model
    from hswq.loader.model import original
    from hswq.loader.sessions.store import path_of

    folder_paths.set_output_directory(str(tmp_path))
    model = comfy.load_model(tiny.make("flux-tiny"))
    state = utils.load_torch_file(str(tiny.lora("flux-tiny")))
    patched, _ = sd.load_lora_for_models(model, None, state, 0.5, 0.0)
    parameter = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    before = original(model.get_key_patches(parameter)[parameter]).clone()
    comfy.sample(calibrated(patched, path_of("lora"), 50, lambda text: None))
    done = convert_model(patched, None, None, Request("lora", "v2", "hswq", keep_ratio=1.0), lambda *_: None)
    assert done.plan.counts()["quantize"] == 0
    stem = "diffusion_model.double_blocks.0.img_attn.qkv.lora_"
    delta = state[f"{stem}up.weight"].float() @ state[f"{stem}down.weight"].float()
    alpha = state.get("diffusion_model.double_blocks.0.img_attn.qkv.alpha")
    rank = state[f"{stem}down.weight"].shape[0]
    delta *= 0.5 * (1.0 if alpha is None else alpha.item() / rank)
    entries = FileSource(done.path).entries
    key = next(key for key in entries if key.endswith("double_blocks.0.img_attn.qkv.weight"))
    written = FileSource(done.path).read(key)
    assert torch.equal(written, (before.float() + delta).to(written.dtype))
    assert torch.equal(original(model.get_key_patches(parameter)[parameter]), before)


@pytest.mark.compat
def test_a_model_without_a_usable_file_is_written_as_comfyui_names_it(comfy, tmp_path):
    import folder_paths
    from hswq.loader.calibration.model import calibrated
    from hswq.loader.convert.model import Request, convert_model
    from hswq.loader.sessions.store import path_of

    folder_paths.set_output_directory(str(tmp_path))
    model = comfy.load_model(tiny.make("flux-tiny"))
    model.cached_patcher_init = None
    comfy.sample(calibrated(model, path_of("memory"), 50, lambda text: None))
    done = convert_model(model, None, None, Request("memory", "comfy", "hswq"), lambda *_: None)
    assert all(key.startswith(PREFIX) for key in FileSource(done.path).entries)
    assert comfy.sample(comfy.load_model(done.path)).isfinite().all()


@pytest.mark.compat
def test_the_check_refuses_a_file_with_a_lost_scale(comfy, made, tmp_path):
    from hswq.loader.open.verify import verify_file

    file = made(comfy, "flux-tiny", "comfy")
    path, plan = file.path, file.plan
    state = load_file(path)
    victim = next(layer.name for layer in plan.layers if layer.scaled)
    del state[f"{victim}.comfy_quant" if f"{victim}.comfy_quant" in state else f"{PREFIX}{victim}.comfy_quant"]
    save_file(state, tmp_path / "lost.safetensors")
    verify_file(path, plan, format_named("comfy"))
    with pytest.raises(FileError, match=r"unexpected keys.*weight_scale"):
        verify_file(tmp_path / "lost.safetensors", plan, format_named("comfy"))


class TestKeys:
    """Which keys are scales, and which only look like one."""

    CODES = torch.ones(4, 8).to(torch.float8_e4m3fn)

    def normalize(self, metadata=None, **state):
        from hswq.loader.open.keys import normalize_keys

        named = {key.replace("__", "."): tensor for key, tensor in state.items()}
        return normalize_keys(named, "", "x.safetensors", metadata)

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

    def test_a_scale_that_got_lost_from_a_v2_file_is_named(self, comfy):
        header = {"hswq": '{"version": 1, "format": "v2"}'}
        with pytest.raises(FileError, match=r"tensor b\.weight_scale.*no such key"):
            self.normalize(header, a__weight=self.CODES, a__scale=torch.ones(1), b__weight=self.CODES)
        assert self.normalize(None, a__weight=self.CODES, a__scale=torch.ones(1), b__weight=self.CODES)

    def test_codes_that_reach_the_largest_give_a_lost_scale_away(self, comfy):
        full = torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn)
        with pytest.raises(FileError, match=r"tensor b\.weight_scale"):
            self.normalize(a__weight=self.CODES, a__scale=torch.ones(1), b__weight=full)
        assert set(self.normalize(b__weight=full)) == {"b.weight"}  # an unscaled file: no sign of a loss

    def test_a_marker_without_its_scale_is_named(self, comfy):
        marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        with pytest.raises(FileError, match=r"a\.weight_scale.*none beside comfy_quant"):
            self.normalize(a__weight=self.CODES, a__comfy_quant=marker)

    @pytest.mark.parametrize("text", ["{", '{"format": 3}', "[]"])
    def test_an_unreadable_marker_is_named(self, comfy, text):
        marker = torch.tensor(list(text.encode()), dtype=torch.uint8)
        with pytest.raises(FileError, match=r"a\.comfy_quant"):
            self.normalize(a__weight=self.CODES, a__comfy_quant=marker, a__weight_scale=torch.ones(1))

    @pytest.mark.parametrize(
        ("marker", "legacy", "cast"),
        [
            ('{"format": "float8_e4m3fn"}', None, True),
            ('{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}', None, False),
            (None, 0, True),
            (None, 2, False),
            (None, None, False),
        ],
    )
    def test_inputs_are_cast_only_where_the_file_says_so(self, comfy, marker, legacy, cast):
        state = {"a__weight": self.CODES, "a__scale_weight": torch.ones(1), "a__scale_input": torch.tensor(0.5)}
        if marker:
            state["a__comfy_quant"] = torch.tensor(list(marker.encode()), dtype=torch.uint8)
        if legacy is not None:
            state["scaled_fp8"] = torch.zeros(legacy, dtype=torch.float8_e4m3fn)
        assert set(self.normalize(**state)) == {"a.weight", "a.weight_scale"} | ({"a.input_scale"} if cast else set())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
    def test_an_unusable_input_scale_is_named(self, comfy, value):
        with pytest.raises(FileError, match=r"a\.input_scale"):
            self.normalize(a__weight=self.CODES, a__weight_scale=torch.ones(1), a__input_scale=torch.tensor([value]))

    def test_a_scale_without_an_fp8_weight_is_refused(self, comfy):
        with pytest.raises(FileError, match="no FP8 weight"):
            self.normalize(a__weight=torch.ones(4, 8), a__weight_scale=torch.ones(1))


def test_the_log_tells_how_many_layers_are_fp8(comfy, made, caplog):
    file = made(comfy, "flux-tiny", "v2")
    with caplog.at_level(logging.INFO):
        model = file.open().model.diffusion_model
    float8 = sum(layer.action == QUANTIZE for layer in file.plan.layers)
    linear = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert 0 < float8 < linear
    assert f"{float8} layers in FP8, {linear - float8} in 16 bits" in caplog.text


def test_a_file_without_fp8_is_refused(comfy, tools):
    with pytest.raises(FileError, match="ComfyUI's own loader"):
        tools.opened(tiny.make("flux-tiny"))


def test_a_truncated_file_is_refused(comfy, made, tools, tmp_path):
    whole = made(comfy, "flux-tiny", "v2").path.read_bytes()
    for size in (0, 7, 1000, len(whole) - 1):
        (tmp_path / "half.safetensors").write_bytes(whole[:size])
        with pytest.raises(FileError, match=r"half\.safetensors.*Download or convert the file again"):
            tools.opened(tmp_path / "half.safetensors")


@pytest.mark.compat
def test_a_dtype_that_comfyui_cannot_read_is_refused(comfy, tools, tmp_path):
    header = json.dumps({"x.weight": {"dtype": "F9", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(FileError, match=r"odd\.safetensors.*Download or convert the file again"):
        tools.opened(tmp_path / "odd.safetensors")


def test_a_pickle_is_refused(comfy, tools, tmp_path):
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "model.ckpt")
    with pytest.raises(FileError, match=r"model\.ckpt.*must be converted to \.safetensors"):
        tools.opened(tmp_path / "model.ckpt")


@pytest.mark.compat
def test_another_file_of_the_same_name_is_not_taken_for_the_open_one(comfy, made, tmp_path):
    """ComfyUI opens a model again for torch.compile, hooks and several GPUs."""
    import shutil

    from hswq.loader.open.open import open_diffusion_model
    from hswq.loader.open.options import Opening

    path = shutil.copy(made(comfy, "flux-tiny", "v2").path, tmp_path / "model.safetensors")
    model = open_diffusion_model(path, Opening())
    again, arguments = model.cached_patcher_init
    wanted = comfy.sample(model)
    assert torch.equal(comfy.sample(again(*arguments, disable_dynamic=True)), wanted)
    shutil.copy(made(comfy, "flux-tiny", "comfy").path, tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(path)
    with pytest.raises(FileError, match=r"model\.safetensors: got another file of that name.*Queue again"):
        again(*arguments, disable_dynamic=True)
    path.unlink()
    with pytest.raises(FileError, match="FileNotFoundError"):
        again(*arguments)
    assert torch.equal(comfy.sample(model), wanted)  # the open model still has its own weights


@pytest.mark.parametrize("options", [{"lora": "fast"}, {"dequantize_dtype": "int8"}])
def test_an_unknown_option_is_named(comfy, options):
    from hswq.loader.open.options import Opening

    with pytest.raises(SettingError, match=next(iter(options))):
        Opening(**options)


def test_statistics_of_the_predecessor_convert_and_go_on_growing(comfy, tools, tmp_path):
    import folder_paths
    from hswq.hswq_core.calibration.session import load_session
    from hswq.loader.calibration.model import calibrated
    from hswq.loader.convert.model import Request, convert_model
    from hswq.loader.sessions.store import path_of

    folder_paths.set_output_directory(str(tmp_path))
    model = comfy.load_model(tiny.make("flux-tiny"))
    layers = {}
    for name, module in tools.modules(model).items():
        record = {"output_sum": 1.0, "output_sq_sum": 2.0, "out_count": 4, "in_count": 4}
        layers[name] = {**record, "input_imp_sum": torch.ones(module.in_features, dtype=torch.float64)}
    path_of("theirs").parent.mkdir()
    torch.save({"meta": {"type": "hswq_dual_monitor_v2"}, "layers": layers}, path_of("theirs"))
    done = convert_model(model, None, None, Request("theirs", "v2", "hswq"), lambda *_: None)
    assert "_r4_" in done.path.name
    comfy.sample(calibrated(model, path_of("theirs"), 50, lambda text: None), steps=2, cfg=1.0)
    assert load_session(path_of("theirs")).calls == 6


@pytest.mark.compat
def test_a_scaled_layer_that_is_no_linear_is_named(comfy, made, tools, tmp_path):
    """An FP8 norm with a scale: ComfyUI would load it without the scale."""
    file = made(comfy, "sd15-small", "v2")
    state = load_file(file.path)
    key = next(key for key in state if key.startswith(file.prefix) and key.endswith("norm1.weight"))
    state[key] = state[key].to(torch.float8_e4m3fn)
    state[f"{key.removesuffix('weight')}scale"] = torch.tensor([0.5])
    save_file(state, tmp_path / "norm.safetensors")
    with pytest.raises(FileError, match=rf"{key}.*neither Linear nor Conv2d"):
        tools.opened(tmp_path / "norm.safetensors")


@pytest.mark.compat
def test_a_file_no_comfyui_knows_is_refused(comfy, tools, tmp_path):
    codes = torch.ones(4, 8).to(torch.float8_e4m3fn)
    save_file({"a.weight": codes, "a.scale": torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(FileError, match=r"odd\.safetensors: got a model this ComfyUI does not recognize"):
        tools.opened(tmp_path / "odd.safetensors")


@pytest.mark.compat
def test_the_checkpoint_loader_opens_whole_checkpoints_and_says_what_else_to_use(comfy, made):
    from hswq.loader.open.open import open_checkpoint
    from hswq.loader.open.options import Opening

    whole, bare = made(comfy, "sd15-small", "v2"), made(comfy, "flux-tiny", "v2")
    model, _, _ = open_checkpoint(whole.path, Opening())
    assert torch.equal(comfy.sample(model), comfy.sample(whole.open()))
    again, arguments = model.cached_patcher_init
    assert torch.equal(comfy.sample(again(*arguments, disable_dynamic=True)), comfy.sample(model))
    with pytest.raises(FileError, match=r"the other one of the two loaders"):
        open_checkpoint(bare.path, Opening())
