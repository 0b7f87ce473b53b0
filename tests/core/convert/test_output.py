from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.convert.header import header_metadata
from hswq.hswq_core.convert.output import Conversion, output_tensors, report, source_layers, write_plan
from hswq.hswq_core.errors import LayerError
from hswq.hswq_core.files.checkpoint import FileSource, TensorSource, source_hash
from hswq.hswq_core.methods.exclusions import Exclusions
from hswq.hswq_core.methods.hswq import plan_hswq
from hswq.hswq_core.methods.solve import Solution
from hswq.hswq_core.model.families import GENERIC
from hswq.hswq_core.model.layer import Layer
from hswq.hswq_core.plan.formats import format_named
from hswq.hswq_core.plan.plan import KEEP, QUANTIZE, SKIP, LayerPlan, Plan
from hswq.hswq_core.progress import Step
from hswq.hswq_core.quant.grid import FLOAT8_E4M3FN

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
        scaled = action == QUANTIZE and row.scaled(kind)
        return LayerPlan(name, kind, shape, action, f"why {action}", scaled, amax)

    layers = (
        layer("fc", (16, 12), QUANTIZE, 0.09375),
        layer("conv", (8, 4, 3, 3), QUANTIZE, 0.1),
        layer("conv_kept", (8, 4, 1, 1), KEEP),
        layer("kept", (6, 4), KEEP),
        layer("tiny", (2, 4), SKIP),
    )
    return Plan(file_format, "hswq", "0.25", "SDXL", FLOAT8_E4M3FN.name, layers)


@pytest.fixture
def source(source_of) -> TensorSource:
    return source_of(tensors(), METADATA)


@pytest.fixture
def session(session_of, stats_of):
    own = {name: tensors()[f"{PREFIX}{name}.weight"] for name in KINDS}
    return session_of(own, {name: stats_of(KINDS[name], tuple(w.shape)) for name, w in own.items()})


def convert(source: TensorSource, session, file_format: str, path: Path) -> tuple[Conversion, FileSource]:
    done = write_plan(path, source, PREFIX, plan(file_format), session)
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
    scaled = format_named(file_format).scaled("Linear")
    weight = tensors()[f"{PREFIX}fc.weight"]
    codes = torch.full_like(weight, 3.5).to(torch.float8_e4m3fn)
    correction = torch.linspace(-1, 1, 16)
    scale = torch.tensor(0.09375) / 448 if scaled else None
    own = Solution(codes, scale, "compensated", correction, 0.0, 0.0)
    write_plan(tmp_path / "f", source, PREFIX, plan(file_format), session, solutions={"fc": own})
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
    own = Solution(codes, torch.ones(()), "compensated", torch.ones(6), 0.0, 0.0)
    write_plan(tmp_path / "f", source, PREFIX, plan("v2"), session, solutions={"kept": own})
    convert(source, session, "v2", tmp_path / "plain")
    assert (tmp_path / "f").read_bytes() == (tmp_path / "plain").read_bytes()


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
        expected = FLOAT8_E4M3FN.fake_quantize(made[f"{key}weight"], layer.amax, scaled=layer.scaled)
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
    for tensor in output_tensors(source, PREFIX, plan("comfy")):
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
        made = plan_hswq(
            source_layers(source, "", kinds),
            session,
            lambda layer: source.read(f"{layer.name}.weight"),
            exclusions=Exclusions(GENERIC),
            file_format=format_named(file_format),
            keep_ratio=0.34,
        )
        assert made.counts() == {"quantize": 2, "keep": 1, "skip": 0}
        write_plan(tmp_path / name, source, "", made, session)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# The result and the report


def test_the_conversion_tells_its_sizes(source, session, tmp_path):
    done, _ = convert(source, session, "v1", tmp_path / "f.safetensors")
    assert done.path == tmp_path / "f.safetensors"
    assert done.size == done.path.stat().st_size
    assert done.source_bytes == sum(tensor.nbytes for tensor in tensors().values())
    assert done.plan == plan("v1")


def test_a_check_that_refuses_leaves_nothing(source, session, tmp_path):
    def refuse(_path: Path) -> None:
        raise LayerError("Layer fc", got="noise", expected="the weight", remedy="Report this.")

    with pytest.raises(LayerError):
        write_plan(tmp_path / "f.safetensors", source, PREFIX, plan("v2"), session, check=refuse)
    assert list(tmp_path.iterdir()) == []


def test_cancelling_leaves_nothing(source, session, tmp_path):
    def cancel(_step: Step, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(tmp_path / "f.safetensors", source, PREFIX, plan("v2"), session, progress=cancel)
    assert list(tmp_path.iterdir()) == []


def measured(file_format: str, family: str = "SDXL") -> Conversion:
    layers = (
        LayerPlan("good", "Linear", (4, 4), QUANTIZE, "clip search", sqnr_db=31.0),
        LayerPlan("bad", "Linear", (4, 4), QUANTIZE, "clip search", sqnr_db=20.0),
        LayerPlan("exact", "Linear", (4, 4), QUANTIZE, "clip search", sqnr_db=None),
        LayerPlan("kept", "Linear", (4, 4), KEEP, "high sensitivity"),
        LayerPlan("tiny", "Linear", (2, 2), SKIP, "tiny"),
    )
    done = Plan(file_format, "hswq", "0.25", family, FLOAT8_E4M3FN.name, layers)
    return Conversion(Path("out/model.safetensors"), 3 * 2**20, 6 * 2**20, done)


def test_the_report_line_by_line(session):
    assert report(measured("v2"), session).splitlines() == [
        "model.safetensors",
        "SDXL, v2, method hswq 0.25, session of 2 calls",
        "3.0 MB (50.0% of the source)",
        "3 quantized + 1 kept + 1 skipped (tiny: 1) = 5 layers",
        "kept, high sensitivity: 1",
        "weight SQNR: mean 25.5 dB, worst 20.0 dB (bad)",
        "Opens in: HSWQ Loader.",
    ]


def test_the_report_warns_of_v1_and_of_unknown_families(session):
    assert "turn every layer of a v1 file to FP8" in report(measured("v1"), session)
    assert "generic" in report(measured("comfy", "generic"), session).splitlines()[-1]
    assert "generic" not in report(measured("comfy"), session)


def test_the_report_of_a_plan_that_quantizes_nothing(source, session, tmp_path):
    assert "SQNR" not in report(convert(source, session, "v1", tmp_path / "f")[0], session)
