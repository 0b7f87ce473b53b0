from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.convert.header import header_metadata
from hswq.hswq_core.convert.output import Conversion, Output, source_layers
from hswq.hswq_core.errors import LayerError
from hswq.hswq_core.files.checkpoint import FileSource, TensorSource, source_hash
from hswq.hswq_core.methods.exclusions import Exclusions
from hswq.hswq_core.methods.hswq import HSWQSettings, plan_hswq
from hswq.hswq_core.methods.method import Task
from hswq.hswq_core.methods.solutions import Solutions
from hswq.hswq_core.methods.solve import Solution
from hswq.hswq_core.model.families import GENERIC
from hswq.hswq_core.model.layer import Layer
from hswq.hswq_core.plan.encoding import Encoding
from hswq.hswq_core.plan.formats import format_named
from hswq.hswq_core.plan.plan import KEEP, QUANTIZE, SKIP, LayerPlan, Plan
from hswq.hswq_core.progress import Step
from hswq.hswq_core.quant.schemes.table import SCHEMES

PREFIX = "model.diffusion_model."
KINDS = {"fc": "Linear", "conv": "Conv2d", "conv_kept": "Conv2d", "kept": "Linear", "tiny": "Linear"}
METADATA = {"format": "pt", "modelspec.title": "Toy é", "hswq": "of an older conversion"}
FP8 = torch.float8_e4m3fn


def tensors(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A checkpoint in no alphabetical order, with layers between tensors that are none."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(shape, generator=g) * 0.05).to(of)

    return {
        "first_stage_model.encoder.weight": randn(3, 5, of=torch.float32),
        f"{PREFIX}norm.weight": randn(16),
        f"{PREFIX}fc.weight": randn(16, 12),
        f"{PREFIX}fc.bias": randn(16),
        f"{PREFIX}conv.weight": randn(8, 4, 3, 3),
        f"{PREFIX}conv.bias": randn(8),
        f"{PREFIX}conv_kept.weight": randn(8, 4, 1, 1),
        f"{PREFIX}kept.weight": randn(6, 4),
        f"{PREFIX}tiny.weight": randn(2, 4),
        "fc.weight": randn(16, 12),  # of other models in the same file, the second behind a prefix as long as ours
        "cond_stage_model.text.fc.weight": randn(16, 12),
        "cond_stage_model.position_ids": torch.arange(7),
        "logit_scale": torch.tensor(4.6052),
        "empty": torch.empty(0, 3),
    }


def plan(file_format: str) -> Plan:
    row = format_named(file_format)

    def layer(name: str, shape: tuple[int, ...], action: str, amax: float = 0.0) -> LayerPlan:
        kind = KINDS[name]
        scheme = row.usual(kind).name if action == QUANTIZE else ""
        return LayerPlan(name, kind, shape, action, f"why {action}", scheme, amax)

    layers = (
        layer("fc", (16, 12), QUANTIZE, 0.09375),
        layer("conv", (8, 4, 3, 3), QUANTIZE, 0.1),
        layer("conv_kept", (8, 4, 1, 1), KEEP),
        layer("kept", (6, 4), KEEP),
        layer("tiny", (2, 4), SKIP),
    )
    return Plan(file_format, "hswq", "0.25", "SDXL", layers)


@pytest.fixture
def source(source_of) -> TensorSource:
    return source_of(tensors(), METADATA)


@pytest.fixture
def session(session_of, stats_of):
    own = {name: tensors()[f"{PREFIX}{name}.weight"] for name in KINDS}
    return session_of(own, {name: stats_of(KINDS[name], tuple(w.shape)) for name, w in own.items()})


def convert(source: TensorSource, session, file_format: str, path: Path) -> tuple[Conversion, FileSource]:
    done = Output(source, PREFIX, plan(file_format), session).write(path)
    return done, FileSource(path)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


# The layers of a source


def test_layers_come_in_the_sources_order_with_its_dtypes(source):
    assert source_layers(source, PREFIX, dict(reversed(KINDS.items()))) == [
        Layer("fc", "Linear", (16, 12), torch.float16),
        Layer("conv", "Conv2d", (8, 4, 3, 3), torch.float16),
        Layer("conv_kept", "Conv2d", (8, 4, 1, 1), torch.float16),
        Layer("kept", "Linear", (6, 4), torch.float16),
        Layer("tiny", "Linear", (2, 4), torch.float16),
    ]


def test_without_a_prefix_only_whole_names_match(source):
    assert source_layers(source, "", {"fc": "Linear"}) == [Layer("fc", "Linear", (16, 12), torch.float16)]


def test_a_layer_the_source_lacks_is_an_error_that_names_it(source):
    with pytest.raises(LayerError, match=r"toy, layer gone\.fc"):
        source_layers(source, PREFIX, {**KINDS, "gone.fc": "Linear"})


def test_a_layer_of_another_rank_is_an_error_that_names_it(source):
    with pytest.raises(LayerError, match=r"toy, layer fc.*rank"):
        source_layers(source, PREFIX, {**KINDS, "fc": "Conv2d"})


# Layers that a method has rounded itself


@pytest.mark.parametrize("file_format", ["v1", "v2", "comfy"])
def test_a_solutions_codes_are_written_and_its_correction_added_to_the_bias(source, session, tmp_path, file_format):
    scheme = format_named(file_format).usual("Linear")
    weight = tensors()[f"{PREFIX}fc.weight"]
    codes = torch.full_like(weight, 3.5).to(torch.float8_e4m3fn)
    correction = torch.linspace(-1, 1, 16)
    scale = {"weight_scale": torch.tensor(0.09375) / 448} if scheme.scaled else {}
    own = Solution(scheme.name, {"weight": codes, **scale}, "compensated", correction, 0.0, 0.0)
    Output(source, PREFIX, plan(file_format), session, {"fc": own}).write(tmp_path / "f")
    plain = convert(source, session, file_format, tmp_path / "plain")[1]
    file = FileSource(tmp_path / "f")
    assert list(file.entries) == list(plain.entries)
    changed = [key for key in file.entries if raw(file.read(key)) != raw(plain.read(key))]
    assert changed == [f"{PREFIX}fc.weight", f"{PREFIX}fc.bias"]
    assert torch.equal(file.read(f"{PREFIX}fc.weight").float(), codes.float())
    wanted = (tensors()[f"{PREFIX}fc.bias"].float() + correction).half()
    assert torch.equal(file.read(f"{PREFIX}fc.bias"), wanted)


def test_a_solution_of_a_layer_that_is_kept_changes_nothing(source, session, tmp_path):
    codes = torch.zeros(6, 4).to(torch.float8_e4m3fn)
    made = {"weight": codes, "weight_scale": torch.ones(())}
    own = Solution("fp8", made, "compensated", torch.ones(6), 0.0, 0.0)
    Output(source, PREFIX, plan("v2"), session, {"kept": own}).write(tmp_path / "f")
    convert(source, session, "v2", tmp_path / "plain")
    assert (tmp_path / "f").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("file_format", ["v1", "v2", "comfy"])
def test_solutions_are_left_alone_and_give_the_same_file_again(source, session, tmp_path, file_format):
    row, solutions = format_named(file_format), {}
    for name in ("fc", "conv"):
        scheme = row.usual(KINDS[name])
        made = scheme.nearest_tensors(tensors()[f"{PREFIX}{name}.weight"], 0.05)
        solutions[name] = Solution(scheme.name, made, "compensated", None, 0.0, 0.0)
    before = {name: {key: raw(tensor) for key, tensor in own.tensors.items()} for name, own in solutions.items()}
    for name in ("one", "two"):
        Output(source, PREFIX, plan(file_format), session, solutions).write(tmp_path / name)
        after = {name: {key: raw(tensor) for key, tensor in own.tensors.items()} for name, own in solutions.items()}
        assert after == before
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_scales_of_channels_are_written_with_their_codes(source, session, tmp_path):
    """Of a solution, and of a layer rounded when it is written."""
    channel = SCHEMES["fp8_channel"]
    layers = [replace(layer, scheme=channel.name) if layer.scaled else layer for layer in plan("v2").layers]
    weights = {name: tensors()[f"{PREFIX}{name}.weight"] for name in ("fc", "conv")}
    own = Solution(channel.name, channel.nearest_tensors(weights["fc"]), "compensated", None, 0.0, 0.0)
    Output(source, PREFIX, replace(plan("v2"), layers=tuple(layers)), session, {"fc": own}).write(tmp_path / "f")
    file = FileSource(tmp_path / "f")
    for name, limit in (("fc", None), ("conv", 0.1)):
        expected = channel.nearest_tensors(weights[name], limit)
        scale = file.read(f"{PREFIX}{name}.scale")
        assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (len(weights[name]),))
        assert raw(scale) == raw(expected["weight_scale"])
        assert raw(file.read(f"{PREFIX}{name}.weight")) == raw(expected["weight"])
    assert json.loads(file.metadata["hswq_plan"])["granularity"] == "channel"


def test_a_comfy_layer_that_multiplies_in_8_bits_has_the_scale_of_its_inputs(source, session, tmp_path):
    layers = [replace(layer, input_amax=3.5) if layer.name == "fc" else layer for layer in plan("comfy").layers]
    Output(source, PREFIX, replace(plan("comfy"), layers=tuple(layers)), session).write(tmp_path / "f")
    file = FileSource(tmp_path / "f")
    scale = file.read(f"{PREFIX}fc.input_scale")
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, ())
    assert scale.item() == pytest.approx(3.5 / 448, rel=1e-7)
    marker = json.loads(raw(file.read(f"{PREFIX}fc.comfy_quant")))
    assert marker == {"format": "float8_e4m3fn", "full_precision_matrix_mult": False}


# The keys of each format

BEFORE = ["first_stage_model.encoder.weight", f"{PREFIX}norm.weight"]
AFTER = [
    f"{PREFIX}conv_kept.weight",
    f"{PREFIX}kept.weight",
    f"{PREFIX}tiny.weight",
    "fc.weight",
    "cond_stage_model.text.fc.weight",
    "cond_stage_model.position_ids",
    "logit_scale",
    "empty",
]
LAYER_KEYS = {
    "v1": ["fc.weight", "fc.bias", "conv.weight", "conv.bias"],
    "v2": ["fc.weight", "fc.scale", "fc.bias", "conv.weight", "conv.scale", "conv.bias"],
    "comfy": ["fc.weight", "fc.weight_scale", "fc.comfy_quant", "fc.bias", "conv.weight", "conv.bias"],
}


@pytest.mark.parametrize("file_format", LAYER_KEYS)
def test_keys_and_their_order(file_format, source, session, tmp_path):
    _, file = convert(source, session, file_format, tmp_path / "f.safetensors")
    assert list(file.entries) == [*BEFORE, *(PREFIX + key for key in LAYER_KEYS[file_format]), *AFTER]


@pytest.mark.parametrize("file_format", LAYER_KEYS)
def test_quantized_weights_are_fp8_of_the_same_shape(file_format, source, session, tmp_path):
    _, file = convert(source, session, file_format, tmp_path / "f.safetensors")
    fp8 = {key: info.shape for key, info in file.entries.items() if info.dtype == FP8}
    assert fp8 == {f"{PREFIX}fc.weight": (16, 12), f"{PREFIX}conv.weight": (8, 4, 3, 3)}


def test_v2_scales_are_float32_vectors_of_one_multiplier(source, session, tmp_path):
    _, file = convert(source, session, "v2", tmp_path / "f.safetensors")
    for name, amax in (("fc", 0.09375), ("conv", 0.1)):
        scale = file.read(f"{PREFIX}{name}.scale")
        assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (1,))
        assert scale.item() == pytest.approx(amax / 448, rel=1e-7)


def test_a_comfy_scale_is_a_float32_scalar_beside_a_json_marker(source, session, tmp_path):
    _, file = convert(source, session, "comfy", tmp_path / "f.safetensors")
    scale, marker = file.read(f"{PREFIX}fc.weight_scale"), file.read(f"{PREFIX}fc.comfy_quant")
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, ())
    assert scale.item() == pytest.approx(0.09375 / 448, rel=1e-7)
    assert json.loads(raw(marker)) == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


def test_a_comfy_convolution_never_has_a_scale_or_marker(source, session, tmp_path):
    _, file = convert(source, session, "comfy", tmp_path / "f.safetensors")
    convolutions = [key for key in file.entries if key.startswith(f"{PREFIX}conv")]
    assert convolutions == [f"{PREFIX}{key}" for key in ("conv.weight", "conv.bias", "conv_kept.weight")]


# The values


@pytest.mark.parametrize("file_format", LAYER_KEYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantizing_the_file_gives_fake_quantize_bit_for_bit(file_format, dtype, source_of, session, tmp_path):
    made = tensors(dtype)
    _, file = convert(source_of(made), session, file_format, tmp_path / "f.safetensors")
    for layer in plan(file_format).layers[:2]:
        key = f"{PREFIX}{layer.name}."
        scale = next(
            (file.read(key + suffix) for suffix in ("scale", "weight_scale") if key + suffix in file.entries), None
        )
        assert (scale is not None) == layer.scaled
        found = file.read(f"{key}weight").to(torch.float32)
        found = found if scale is None else found * scale
        scheme = SCHEMES["fp8" if layer.scaled else "fp8_cast"]
        expected = scheme.fake_quantize(made[f"{key}weight"], layer.amax)
        assert raw(found) == raw(expected)


@pytest.mark.parametrize("file_format", LAYER_KEYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_everything_else_survives_bit_for_bit(file_format, dtype, source_of, session, tmp_path):
    made = tensors(dtype)
    _, file = convert(source_of(made), session, file_format, tmp_path / "f.safetensors")
    for key, tensor in made.items():
        if key not in (f"{PREFIX}fc.weight", f"{PREFIX}conv.weight"):
            assert file.entries[key].dtype == tensor.dtype
            assert file.entries[key].shape == tuple(tensor.shape)
            assert raw(file.read(key)) == raw(tensor)


def test_layers_kept_of_a_float32_source_become_float16_and_nothing_else_does(source_of, session, tmp_path):
    made = tensors(torch.float32)
    _, file = convert(source_of(made), session, "v2", tmp_path / "f.safetensors")
    half = {key for key, info in file.entries.items() if info.dtype == torch.float16}
    assert half == {f"{PREFIX}{name}.weight" for name in ("conv_kept", "kept", "tiny")}
    for key in half:
        assert torch.equal(file.read(key), made[key].half())


def test_a_kept_float32_weight_beyond_float16_is_not_made_infinite(source_of, session, tmp_path):
    made = tensors(torch.float32)
    made[f"{PREFIX}kept.weight"][0, 0] = 1e5
    with pytest.raises(LayerError, match=r"Layer kept, weight.*65504"):
        convert(source_of(made), session, "v2", tmp_path / "f.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_left_alone(source, session, tmp_path):
    convert(source, session, "v2", tmp_path / "f.safetensors")
    assert {key: raw(tensor) for key, tensor in source.tensors.items()} == {k: raw(t) for k, t in tensors().items()}


def test_every_tensor_starts_where_its_dtype_may(source, session):
    """Loaders map the file into memory: a float16 tensor at an odd address is slow or refused."""
    offset = 0
    for tensor in Output(source, PREFIX, plan("comfy"), session).tensors():
        assert offset % min(tensor.info.dtype.itemsize, 4) == 0, tensor.key
        offset += tensor.info.nbytes


# The header


def test_the_sources_metadata_survive_and_hswq_is_ours(source, session, tmp_path):
    _, file = convert(source, session, "v2", tmp_path / "f.safetensors")
    assert list(file.metadata) == [*METADATA, "hswq_plan"]
    assert (file.metadata["format"], file.metadata["modelspec.title"]) == ("pt", "Toy é")
    assert json.loads(file.metadata["hswq"]) == {
        "version": 1,
        "format": "v2",
        "method": "hswq",
        "budget": "0.25",
        "grid": "float8_e4m3fn",
        "family": "SDXL",
        "session": {"fingerprint": session.fingerprint.layout, "calls": 2, "images": 1},
        "source": {"name": "toy", "sha256_of_header": source_hash(source)},
        "counts": {"quantize": 2, "keep": 2, "skip": 1},
        "plan": 2,
        "schemes": ["fp8"],
        "comfyui": "",
        "kept": {"conv_kept": "why keep", "kept": "why keep"},
        "made_with": {"torch": torch.__version__, "device": f"CPU, {torch.get_num_threads()} threads"},
    }


def test_the_whole_plan_is_in_the_header_and_beside_the_file(source, session, tmp_path):
    done, file = convert(source, session, "v2", tmp_path / "model_0.25_v2.safetensors")
    beside = tmp_path / "model_0.25_v2.plan.json"
    assert Plan.from_json(file.metadata["hswq_plan"]) == done.plan
    assert Plan.from_json(beside.read_text(encoding="utf-8")) == done.plan
    assert len(beside.read_text(encoding="utf-8").splitlines()) > len(done.plan.layers)  # for people to read


def test_the_sources_metadata_object_is_left_alone(source, session):
    header_metadata(source, plan("v2"), session)
    assert source.metadata == METADATA


@pytest.mark.parametrize("file_format", LAYER_KEYS)
def test_two_conversions_are_byte_identical(file_format, source_of, session_of, stats_of, tmp_path):
    """From the statistics to the file: search, plan, header and data."""
    weights = {"a": torch.randn(160, 128) * 0.02, "b": torch.randn(64, 32, 3, 3) * 0.05, "c": torch.randn(160, 128)}
    kinds = {"a": "Linear", "b": "Conv2d", "c": "Linear"}
    stats = {
        name: stats_of(kinds[name], tuple(w.shape), sensitivity=float(i)) for i, (name, w) in enumerate(weights.items())
    }
    source = source_of({f"{name}.weight": w.half() for name, w in weights.items()}, {"format": "pt"})
    session = session_of(weights, stats)
    for name in ("one", "two"):
        session.updated += 1000.0
        task = Task(
            layers=source_layers(source, "", kinds),
            read=lambda layer: source.read(f"{layer.name}.weight"),
            exclusions=Exclusions(GENERIC),
            encoding=Encoding(format_named(file_format)),
            solutions=Solutions(tmp_path / "solutions"),
            session=session,
        )
        made = plan_hswq(task, HSWQSettings(0.34))
        assert made.plan.counts() == {"quantize": 2, "keep": 1, "skip": 0}
        Output(source, "", made.plan, session, made.solutions).write(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# The result and the report


def test_the_conversion_tells_its_sizes(source, session, tmp_path):
    done, _ = convert(source, session, "v1", tmp_path / "f.safetensors")
    assert done.path == tmp_path / "f.safetensors"
    assert done.size == done.path.stat().st_size
    assert done.source_bytes == sum(tensor.nbytes for tensor in tensors().values())
    assert done.plan == plan("v1")
    assert (done.session, done.notes) == (session, ())


def test_a_check_that_refuses_leaves_nothing(source, session, tmp_path):
    def refuse(_path: Path) -> None:
        raise LayerError("Layer fc", got="noise", expected="the weight", remedy="Report this.")

    with pytest.raises(LayerError):
        Output(source, PREFIX, plan("v2"), session).write(tmp_path / "f.safetensors", check=refuse)
    assert list(tmp_path.iterdir()) == []


def test_cancelling_leaves_nothing(source, session, tmp_path):
    def cancel(_step: Step, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Output(source, PREFIX, plan("v2"), session).write(tmp_path / "f.safetensors", progress=cancel)
    assert list(tmp_path.iterdir()) == []


def measured(file_format: str, session, family: str = "SDXL") -> Conversion:
    layers = (
        LayerPlan("good", "Linear", (4, 4), QUANTIZE, "clip search").measured(sqnr_db=31.0),
        LayerPlan("bad", "Linear", (4, 4), QUANTIZE, "clip search").measured(sqnr_db=20.0),
        LayerPlan("exact", "Linear", (4, 4), QUANTIZE, "clip search").measured(sqnr_db=None),
        LayerPlan("kept", "Linear", (4, 4), KEEP, "high sensitivity"),
        LayerPlan("tiny", "Linear", (2, 2), SKIP, "tiny"),
    )
    done = Plan(file_format, "hswq", "0.25", family, layers)
    return Conversion(Path("out/model.safetensors"), 3 * 2**20, 6 * 2**20, done, session)


REPORT = [
    "model.safetensors",
    "SDXL, v2, method hswq 0.25, session of 2 calls",
    "3.0 MB (50.0% of the source)",
    "3 quantized + 1 kept + 1 skipped (tiny: 1) = 5 layers",
    "kept, high sensitivity: 1",
    "weight SQNR: mean 25.5 dB, worst 20.0 dB (bad)",
    "Opens in: HSWQ Loader.",
]


def test_the_report_line_by_line(session):
    assert measured("v2", session).report.splitlines() == REPORT


def test_notes_of_a_method_end_the_report(session):
    done = replace(measured("v2", session), notes=("one", "two"))
    assert done.report.splitlines() == [*REPORT, "one", "two"]


def test_the_report_says_what_learning_won(session):
    done = measured("v2", None)
    losses = {"good": (0.5, 1.0), "bad": (0.75, 1.0), "exact": (0.0, 0.0)}
    layers = [
        layer.measured(loss=losses[layer.name][0], nearest_loss=losses[layer.name][1])
        if layer.name in losses
        else layer
        for layer in done.plan.layers
    ]
    lines = replace(done, plan=replace(done.plan, layers=tuple(layers))).report.splitlines()
    assert lines[1].endswith("without calibration")
    assert "learned rounding: quantized loss 38% below nearest on average, 2 of 2 layers" in lines


def test_the_report_warns_of_v1_and_of_unknown_families(session):
    assert "turn every layer of a v1 file to FP8" in measured("v1", session).report
    assert "generic" in measured("comfy", session, "generic").report.splitlines()[-1]
    assert "generic" not in measured("comfy", session).report


def test_the_report_of_a_plan_that_quantizes_nothing(source, session, tmp_path):
    assert "SQNR" not in convert(source, session, "v1", tmp_path / "f")[0].report
