"""Reports of files and sessions: numbers by hand, others' files, and files that lie."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hswq.hswq_core.calibration.session import Session, save_session
from hswq.hswq_core.calibration.states import Sample, State
from hswq.hswq_core.calibration.states_file import save_states, states_path
from hswq.hswq_core.convert.header import HEADER_KEY, PLAN_KEY, header_metadata
from hswq.hswq_core.errors import FileError, SessionError, SettingError
from hswq.hswq_core.plan.plan import KEEP, QUANTIZE, SKIP, LayerPlan, Plan
from hswq.hswq_core.reports.file import CHANGE, SENSITIVITY, report_file
from hswq.hswq_core.reports.session import report_session
from hswq.hswq_core.reports.table import MOST_ROWS
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[3]
PREFIX = "model.diffusion_model."
# name: (weight shape, action, squared change); 8 bits of all: 64 + 128 + 64 + 32 = 288 bytes
LAYERS = {
    "in.a": ((8, 8), KEEP, 0.09),
    "in.b": ((8, 16), QUANTIZE, 0.0001),
    "out.c": ((8, 8), QUANTIZE, 0.0009),
    "out.d": ((4, 8), SKIP, None),
}


def plan_of(layers=LAYERS, method: str = "model_aware", **common: object) -> Plan:
    rows = [
        LayerPlan(name, "Linear", shape, action, f"why {action}", "fp8_cast" if action == QUANTIZE else "").measured(
            change=change, **common
        )
        for name, (shape, action, change) in layers.items()
    ]
    return Plan("v1", method, "3pct", "SDXL", tuple(rows))


def write(folder: Path, source_of, plan: Plan, session: Session | None = None, **changed: str) -> Path:
    """A file with the tensors and the header of a plan."""
    dtypes = {QUANTIZE: torch.float8_e4m3fn, KEEP: torch.float16, SKIP: torch.float16}
    tensors = {f"{PREFIX}{row.name}.weight": torch.ones(row.shape).to(dtypes[row.action]) for row in plan.layers}
    tensors["first_stage_model.x.weight"] = torch.ones(10, dtype=torch.float32)
    metadata = header_metadata(source_of(tensors), plan, session) | changed
    save_file(tensors, folder / "made.safetensors", metadata=metadata)
    return folder / "made.safetensors"


@pytest.fixture
def session(session_of, stats_of) -> Session:
    """Eight layers of sensitivity 0 to 7, two small ones never quantized."""
    shapes = {**{f"in.{i}": (256, 128) for i in range(8)}, "out.8": (8, 8), "out.9": (8, 8)}
    layers = {
        name: stats_of("Linear", shape, sensitivity=float(i), calls=40)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return session_of({name: torch.ones(shape) for name, shape in shapes.items()}, layers)


# A converted file


def test_a_files_layers_are_those_of_its_plan_in_its_order(tmp_path, source_of, session):
    report = report_file(write(tmp_path, source_of, plan_of(sqnr_db=30.0), session))
    assert report.measure == CHANGE
    assert [(row.name, row.action, row.nbytes) for row in report.rows] == [
        ("in.a", KEEP, 128),
        ("in.b", QUANTIZE, 128),
        ("out.c", QUANTIZE, 64),
        ("out.d", SKIP, 64),
    ]
    assert [row.measure for row in report.rows] == [pytest.approx(30.0), pytest.approx(1.0), pytest.approx(3.0), None]


def test_bytes_are_those_of_the_file_and_beyond_every_layer_in_8_bits(tmp_path, source_of, session):
    report = report_file(write(tmp_path, source_of, plan_of(), session))
    assert (report.nbytes, report.smallest) == (40 + 384, 40 + 288)
    assert report.extra == pytest.approx(96 / 328)


def test_a_plan_of_release_0_2_gives_the_same_report(tmp_path, source_of, session):
    data = json.loads(plan_of(sqnr_db=30.0).to_json())
    for record in data["layers"]:
        del record["scheme"]
    for name in ("now", "then"):
        (tmp_path / name).mkdir()
    now = report_file(write(tmp_path / "now", source_of, plan_of(sqnr_db=30.0), session))
    old = {PLAN_KEY: json.dumps(data)}
    assert report_file(write(tmp_path / "then", source_of, plan_of(sqnr_db=30.0), session, **old)) == now


@pytest.mark.parametrize("said", ["v9", ""])
def test_a_plan_that_says_no_known_format_is_reported_by_its_layers(said, tmp_path, source_of):
    """The header says the format, and is checked."""
    plan = replace(plan_of(), file_format=said)
    report = report_file(write(tmp_path, source_of, plan_of(), **{PLAN_KEY: plan.to_json()}))
    assert [(row.name, row.action) for row in report.rows] == [(layer.name, layer.action) for layer in plan.layers]
    assert (report.nbytes, report.smallest) == (40 + 384, 40 + 288)


def test_a_layer_of_a_later_scheme_is_believed(tmp_path, source_of):
    """Whatever tensor it is; only the layer's name and numbers are this release's."""
    plan = plan_of()
    layers = [replace(layer, scheme="int3") if layer.name == "in.b" else layer for layer in plan.layers]
    report = report_file(write(tmp_path, source_of, replace(plan, layers=tuple(layers))))
    assert [(row.name, row.action) for row in report.rows] == [(layer.name, layer.action) for layer in layers]
    assert (report.nbytes, report.smallest) == (40 + 384, 40 + 288)


def test_the_facts_close_the_books_and_say_what_was_measured(tmp_path, source_of, session):
    text = report_file(write(tmp_path, source_of, plan_of(), session)).markdown()
    for said in (
        "## made.safetensors",
        "SDXL, format v1, method model_aware 3pct",
        "2 quantized + 1 kept + 1 skipped (why skip: 1) = 4 layers",
        "+29.3% beyond every layer in 8 bits",
        "calibrated on 40 calls, 1 images",
        "own changes: 30.0 dB; with every layer in 8 bits 10.4 dB",  # 0.001 and 0.091
    ):
        assert said in text


def test_the_curve_keeps_layers_as_the_budget_does(tmp_path, source_of):
    """Per byte: a 0.09/64, c 0.0009/64, b 0.0001/128; d is in 16 bits anyway."""
    curve = report_file(write(tmp_path, source_of, plan_of())).curve
    left = {32: 0.091, 32 + 64: 0.001, 32 + 128: 0.0001}
    assert curve.points == tuple((extra, pytest.approx(-10 * math.log10(change))) for extra, change in left.items())
    assert curve.chosen == (96, pytest.approx(30.0))


def test_a_chosen_point_lies_on_the_curve_even_where_a_large_layer_did_not_fit(tmp_path, source_of):
    layers = {"a": ((8, 80), QUANTIZE, 0.5), "b": ((8, 8), KEEP, 0.01), "c": ((8, 8), QUANTIZE, 0.001)}
    curve = report_file(write(tmp_path, source_of, plan_of(layers))).curve
    assert curve.chosen in curve.points


def test_a_file_of_which_nothing_is_left_in_8_bits_has_no_point(tmp_path, source_of):
    layers = {"a": ((8, 8), KEEP, 0.5), "b": ((8, 8), QUANTIZE, 0.0)}
    assert report_file(write(tmp_path, source_of, plan_of(layers))).curve.chosen is None


def test_the_worst_layers_come_first_and_forty_at_most(tmp_path, source_of):
    layers = {f"in.{i}": ((8, 8), QUANTIZE, 1e-4 * (1 + i % 60)) for i in range(60)}
    text = report_file(write(tmp_path, source_of, plan_of(layers))).markdown()
    table = [line for line in text.splitlines() if line.startswith("| in.")]
    assert len(table) == MOST_ROWS
    assert table[0].startswith("| in.59 | Linear | 8 |")
    assert table[-1].startswith("| in.20 ")
    assert text.endswith("... and 20 more")


def test_a_file_of_hswq_shows_sensitivity_and_says_what_it_lacks(tmp_path, source_of):
    rows = {name: (shape, action, None) for name, (shape, action, _) in LAYERS.items()}
    report = report_file(write(tmp_path, source_of, plan_of(rows, "hswq", sensitivity=2.0)))
    assert (report.measure, report.curve, report.rows[0].measure) == (SENSITIVITY, None, 2.0)
    assert "method hswq measures no change of the model's output" in report.markdown()
    assert "without calibration" in report.markdown()


def test_a_file_of_nearest_has_its_weights_sqnr_alone(tmp_path, source_of):
    rows = {name: (shape, action, None) for name, (shape, action, _) in LAYERS.items()}
    report = report_file(write(tmp_path, source_of, plan_of(rows, "nearest", sqnr_db=29.0)))
    assert (report.measure, report.curve) == ("", None)
    assert "| layer | kind | bits | why | weight SQNR, dB | MB |" in report.markdown()


# Others' files


def test_a_foreign_file_is_told_by_its_tensors(tmp_path):
    state = {
        f"{PREFIX}in.a.weight": torch.ones(8, 8).to(torch.float8_e5m2),
        f"{PREFIX}in.b.weight": torch.ones(8, 8, 3, 3, dtype=torch.bfloat16),
        f"{PREFIX}in.b.bias": torch.ones(8, dtype=torch.bfloat16),
        "vae.x.weight": torch.ones(4, 4),
    }
    save_file(state, tmp_path / "theirs.safetensors")
    report = report_file(tmp_path / "theirs.safetensors")
    assert sorted((row.name, row.kind, row.action, row.reason, row.nbytes) for row in report.rows) == [
        ("in.a", "Linear", QUANTIZE, "F8_E5M2", 64),
        ("in.b", "Conv2d", KEEP, "BF16", 1152),
    ]
    text = report.markdown()
    assert "1 layers in FP8 + 1 wider = 2 layers" in text
    assert "no measurements in it" in text


def test_a_file_without_fp8_is_refused_by_name(tmp_path):
    save_file({"a.weight": torch.ones(8, 8, dtype=torch.float16)}, tmp_path / "plain.safetensors")
    with pytest.raises(FileError, match=r"plain\.safetensors.*no FP8 weight"):
        report_file(tmp_path / "plain.safetensors")


def test_what_is_no_safetensors_file_is_refused_by_name(tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(FileError, match=r"junk\.safetensors"):
        report_file(tmp_path / "junk.safetensors")


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def spoiled(**changes: object) -> str:
    """A plan whose first layer lies."""
    plan, own = plan_of(), {field.name for field in fields(LayerPlan)}
    first = replace(plan.layers[0], **{name: value for name, value in changes.items() if name in own})
    first = first.measured(**{name: value for name, value in changes.items() if name not in own})
    return replace(plan, layers=(first, *plan.layers[1:])).to_json()


LIES = {
    "no JSON": "{",
    "a list": "[]",
    "deep nesting": deep(100_000),
    "no layers": json.dumps({"file_format": "v1"}),
    "a layer of another type": json.dumps({"layers": [3]}),
    "NaN": spoiled(change=math.nan),
    "infinity": spoiled(sensitivity=math.inf),
    "a negative change": spoiled(change=-1.0),
    "a change in words": spoiled(change="much"),
    "a change beyond all numbers": spoiled(change=10**400),
    "a number for a name": spoiled(name=3),
    "a shape of no numbers": spoiled(shape=("a", "b")),
    "another action": spoiled(action="burn"),
    "a layer twice": spoiled(name="in.b"),
    "a layer that is not there": spoiled(name="in.z"),
    "another shape": spoiled(shape=(8, 9)),
    "kept, but it is FP8": spoiled(name="in.b", action=KEEP),
    "quantized, but it is not": spoiled(action=QUANTIZE),
    "quantized by a scheme, but it is not": spoiled(action=QUANTIZE, scheme="fp8_cast"),
    "quantized in another shape": spoiled(name="in.b", action=QUANTIZE, scheme="fp8_cast"),
    "a scheme of no name": spoiled(scheme=3),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_plan_that_does_not_fit_its_file_is_refused_by_name(lie, tmp_path, source_of):
    path = write(tmp_path, source_of, plan_of(), **{PLAN_KEY: LIES[lie]})
    with pytest.raises(FileError, match=r"made\.safetensors"):
        report_file(path)


@pytest.mark.parametrize("text", ["{", "[]", "3", deep(100_000)])
def test_a_damaged_header_is_refused_by_name(text, tmp_path, source_of):
    with pytest.raises(FileError, match=r"made\.safetensors.*hswq"):
        report_file(write(tmp_path, source_of, plan_of(), **{HEADER_KEY: text}))


def test_names_of_strangers_do_not_leave_their_cell(tmp_path, source_of):
    layers = {"in.`a` | <b> | c": ((8, 8), QUANTIZE, 0.1)}
    text = report_file(write(tmp_path, source_of, plan_of(layers))).markdown()
    (row,) = [line for line in text.splitlines() if line.startswith("| in.")]
    assert row.startswith("| in.\\`a\\` \\| \\<b\\> \\| c | Linear |")


# A session


def saved(session: Session, folder: Path) -> Path:
    save_session(session, folder / "mine.pt")
    return folder / "mine.pt"


def state(number: int, prompt: int) -> State:
    tensors = {"x": torch.full((1, 4), float(number)), "sigma": torch.ones(1), "c": torch.full((1, 2), prompt)}
    return State(number / 100, tensors, {})


def test_a_sessions_layers_and_which_of_them_hswq_would_keep(session, tmp_path):
    report = report_session(saved(session, tmp_path))
    assert [row.action for row in report.rows] == [QUANTIZE] * 6 + [KEEP] * 2 + [SKIP] * 2
    assert [row.measure for row in report.rows] == [pytest.approx(float(i)) for i in range(10)]
    assert [row.level for row in report.rows] == [pytest.approx(1.0)] * 10  # from 0.5 to 1.5
    text = report.markdown()
    assert "hswq at 0.25: 2 would stay in 16 bits, 6 would go to 8 bits, 2 never quantized" in text
    assert "generic, 10 layers, 40 calls, 1 images" in text
    assert "runs: 1 of 20 steps" in text
    assert "recorded 1970-01-01" in text


def test_the_calls_kept_beside_a_session_are_counted(session, tmp_path):
    path = saved(session, tmp_path)
    assert "No calls kept" in report_session(path).calls.text
    sample = Sample(128)
    sample.add([state(i, i % 3) for i in range(7)])
    save_states(sample, session.fingerprint, states_path(path))
    assert "7 calls of 3 prompts kept" in report_session(path).calls.text


def test_a_text_encoders_session_asks_for_no_kept_calls(session, tmp_path):
    session.images = 0
    report = report_session(saved(session, tmp_path))
    assert report.calls is None
    assert "model_aware" not in report.markdown()


def test_a_session_any_time_can_be_reported(session, tmp_path):
    session.created = session.updated = 1e300
    assert "unknown time" in report_session(saved(session, tmp_path)).markdown()


def test_sessions_that_cannot_be_reported_are_refused_by_name(session, tmp_path):
    with pytest.raises(SessionError, match=r"mine\.pt.*no such file"):
        report_session(tmp_path / "mine.pt")
    session.calls = 0
    with pytest.raises(SessionError, match="Session mine"):
        report_session(saved(session, tmp_path))


# Pictures


def figures():
    from hswq.figures import file_figure, session_figure, theme

    return file_figure, session_figure, theme


def assert_readable(figure) -> None:
    """All letters are inside of the picture, and of its lines of text none runs into another."""
    _, _, theme = figures()
    image = theme.to_image(figure)
    assert image.shape == (1, 1200, 1600, 3)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < 0.2
    assert 0.8 < image.max() <= 1
    drawn = figure.get_tightbbox()  # inches
    assert min(drawn.x0, drawn.y0) >= 0
    assert drawn.x1 <= 16
    assert drawn.y1 <= 12
    lines = [(text.get_text(), text.get_window_extent()) for text in figure.texts]
    touching = [(a, b) for i, (a, one) in enumerate(lines) for b, other in lines[i + 1 :] if one.overlaps(other)]
    assert touching == []


def many(count: int) -> dict:
    parts = ["time_embed", "$\\frac{1", "\u65e5\u672c", "output_blocks"]
    return {
        f"{parts[4 * i // count]}.{i}.transformer_blocks.attn1": (
            ((8, 8), (QUANTIZE, KEEP, QUANTIZE, SKIP)[i % 4], None if i % 4 == 3 else 10.0 ** -(2 + i % 5))
        )
        for i in range(count)
    }


@pytest.mark.parametrize(
    ("count", "name"),
    [(1, "made"), (20, "a_$very$_" + "long_" * 30 + "name"), (20, "\u65e5\u672c $\\frac{1"), (794, "made")],
)
def test_a_files_picture_is_readable(count, name, tmp_path, source_of):
    file_figure, _, _ = figures()
    path = write(tmp_path, source_of, plan_of(many(count), sqnr_db=30.0))
    report = replace(report_file(path), name=f"{name}.safetensors")
    assert_readable(file_figure.figure_of(report))


def test_a_picture_without_measured_changes_is_readable(tmp_path, source_of):
    file_figure, _, _ = figures()
    rows = {name: (shape, action, None) for name, (shape, action, _) in LAYERS.items()}
    for method, numbers in (("hswq", {"sensitivity": 2.0, "sqnr_db": 30.0}), ("nearest", {"sqnr_db": 30.0})):
        path = write(tmp_path, source_of, plan_of(rows, method, **numbers))
        assert_readable(file_figure.figure_of(report_file(path)))


def test_a_foreign_files_picture_is_readable(tmp_path):
    file_figure, _, _ = figures()
    save_file({"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}, tmp_path / "theirs.safetensors")
    assert_readable(file_figure.figure_of(report_file(tmp_path / "theirs.safetensors")))


@pytest.mark.parametrize("saves", [0, 1, 5, 60])
def test_a_sessions_picture_is_readable(saves, session, tmp_path):
    _, session_figure, _ = figures()
    for i in range(saves):
        session.calls = session.images = 2 + i
        session.remember()
    session.calls = 2 + saves
    assert_readable(session_figure.figure_of(report_session(saved(session, tmp_path))))


def test_a_picture_shows_what_is_kept_in_its_colour(tmp_path, source_of):
    from hswq.figures.report import picture_of

    _, _, theme = figures()
    orange = torch.tensor([int(theme.ORANGE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    kept = {"a": ((8, 8), KEEP, 0.1), "b": ((8, 8), QUANTIZE, 0.01)}
    none = {"a": ((8, 8), QUANTIZE, 0.1), "b": ((8, 8), QUANTIZE, 0.0)}

    def share(layers) -> float:
        picture = picture_of(report_file(write(tmp_path, source_of, plan_of(layers))))
        return ((picture - orange).abs().amax(-1) < 0.02).float().mean().item()

    assert share(kept) > 0.05
    assert share(none) < share(kept) / 5


LAZY = """
import sys
sys.path.insert(0, sys.argv[1])
from rig import pack
pack.alias()
import hswq.figures.report
assert "matplotlib" not in sys.modules
"""


def test_matplotlib_is_imported_when_the_first_picture_is_drawn():
    subprocess.run([sys.executable, "-c", LAZY, str(ROOT / "bench")], check=True, timeout=120)


def test_without_matplotlib_the_remedy_is_named(tmp_path, source_of, monkeypatch):
    from hswq.figures.report import picture_of

    report = report_file(write(tmp_path, source_of, plan_of()))
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "hswq.figures."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingError, match=r"without matplotlib.*pip install -r requirements\.txt"):
        picture_of(report)
    assert "= 4 layers" in report.markdown()
