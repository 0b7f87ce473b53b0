"""What is written is read back, whatever it says; and read as the libraries that others use read it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hswq.hswq_core.calibration.observer import LayerStats
from hswq.hswq_core.calibration.session import Session, load_session, save_session
from hswq.hswq_core.calibration.states import Sample, State
from hswq.hswq_core.calibration.states_file import load_states, save_states
from hswq.hswq_core.convert.header import HEADER_KEY, PLAN_KEY, declared_format, header_metadata
from hswq.hswq_core.files.checkpoint import FileSource
from hswq.hswq_core.files.pt.reader import read_containers
from hswq.hswq_core.files.tensor_header import DTYPE_NAMES
from hswq.hswq_core.model.fingerprint import Fingerprint, layout_hash
from hswq.hswq_core.plan.plan import ACTIONS, QUANTIZE, LayerPlan, Plan
from hswq.hswq_core.quant.schemes.table import SCHEMES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True)
NAMES = st.text(min_size=1, max_size=40).filter(str.isprintable)
COUNTS = st.integers(0, 2**53)
REALS = st.floats(allow_nan=False, allow_infinity=False)
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
KEPT_DTYPES = list(DTYPE_NAMES)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("round") / "trip"


def tensors(dtypes: list[torch.dtype]) -> st.SearchStrategy[torch.Tensor]:
    """Of random bytes, which are every value there is."""
    shapes = st.lists(st.integers(1, 5), max_size=3)
    return st.builds(_tensor, shapes, st.sampled_from(dtypes), st.integers(0, 2**31))


def _tensor(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    rng = torch.Generator().manual_seed(seed)
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=rng).to(torch.uint8)
    return content.view(dtype).reshape(shape)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _raw(a) == _raw(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (math.isnan(a) and math.isnan(b)))


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | tensors(DTYPES)
TREES = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=8) | st.integers(-(2**31), 2**31), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(TREES)
@EXAMPLES
def test_containers_are_read_as_torch_reads_them(path, tree):
    torch.save(tree, path)
    found = read_containers(path)
    assert same(found, tree)
    assert same(found, torch.load(path, weights_only=True))


def test_parts_of_one_tensor_and_one_tensor_twice(tmp_path):
    whole = torch.arange(10.0, dtype=torch.float64)
    data = {"a": whole[:4], "b": whole[4:], "c": whole[2:6].reshape(2, 2), "d": [whole[:3]] * 1}
    torch.save(data, tmp_path / "x.pt")
    assert same(read_containers(tmp_path / "x.pt"), data)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.ones(1).expand(5),
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2).to_sparse(),
        {1, 2},
        b"bytes",
        1j,
        {1.5: 0},
        {(1, 2): 0},
        2**70,
        torch.float32,
        torch.ones(2).to(torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_what_no_session_holds_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"\w"):
        read_containers(tmp_path / "x.pt")


@st.composite
def statistics(draw: Any) -> LayerStats:
    kind, shape = draw(st.sampled_from([("Linear", (4, 3)), ("Conv2d", (2, 3, 1, 1))]))
    groups = draw(st.integers(1, 3)) if kind == "Conv2d" else 1
    vector = st.lists(st.floats(0, 1e30), min_size=3 * groups, max_size=3 * groups)
    positive = st.floats(0, 1e30)
    return LayerStats(
        kind=kind,
        shape=shape,
        in_calls=draw(COUNTS),
        out_calls=draw(COUNTS),
        out_sum=draw(st.floats(-1e30, 1e30)),
        out_sq_sum=draw(positive),
        abs_sum=torch.tensor(draw(vector), dtype=torch.float64),
        mean_sum=-torch.tensor(draw(vector), dtype=torch.float64),
        input_amax=draw(positive),
    )


@given(
    st.dictionaries(NAMES, statistics(), min_size=1, max_size=4),
    NAMES,
    COUNTS,
    COUNTS,
    st.dictionaries(COUNTS, COUNTS, max_size=3),
    REALS,
)
@EXAMPLES
def test_a_session(path, layers, family, calls, images, steps, when):
    layout = layout_hash({name: (stats.kind, stats.shape) for name, stats in layers.items()})
    print_ = Fingerprint(layout, torch.linspace(-3, 3, 4 * len(layers)))
    session = Session(family, print_, layers, calls, images, steps, when, when)
    save_session(session, path)
    again = load_session(path)
    assert (again.family, again.calls, again.images, again.steps) == (family, calls, images, steps)
    assert (again.created, again.updated, again.fingerprint.layout) == (when, when, layout)
    assert torch.equal(again.fingerprint.weights, print_.weights)
    assert same({name: vars(stats) for name, stats in again.layers.items()}, {n: vars(s) for n, s in layers.items()})


ARGUMENTS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True).filter(
    lambda name: name not in {"t", "control", "transformer_options", "x", "sigma", "sample_sigmas"}
)


@st.composite
def state(draw: Any) -> State:
    names = draw(st.lists(ARGUMENTS, max_size=4, unique=True))
    own = {name: draw(tensors(KEPT_DTYPES)) for name in names[::2]}
    listed = {f"{name}_list/{i}": draw(tensors(KEPT_DTYPES)) for name in names[:1] for i in range(2)}
    constants = {name: draw(st.booleans() | st.integers(-(2**63), 2**63) | REALS | st.text()) for name in names[1::2]}
    picture = {"x": torch.full((1, 2), draw(st.floats(-9, 9, width=32))), "sigma": torch.ones(1)}
    return State(draw(st.floats(0, 1, exclude_max=True)), {**picture, **own, **listed}, constants)


@given(st.lists(state(), max_size=4))
@EXAMPLES
def test_states(path, found):
    sample, fingerprint = Sample(8), Fingerprint("a" * 64, torch.zeros(4))
    sample.add(found)
    save_states(sample, fingerprint, path)
    again = load_states(path, fingerprint, 8)
    assert [s.key for s in again.states] == [s.key for s in sample.states]
    for one, other in zip(again.states, sample.states, strict=True):
        assert one.constants == other.constants
        assert same(dict(sorted(one.tensors.items())), dict(sorted(other.tensors.items())))


@given(st.dictionaries(NAMES, tensors(KEPT_DTYPES), max_size=5), st.dictionaries(st.text(), st.text(), max_size=3))
@EXAMPLES
def test_a_checkpoint(path, found, metadata):
    found.pop("__metadata__", None)
    save_file(found, path, metadata or None)  # without tensors and text the library writes no JSON
    source = FileSource(path)
    assert dict(source.metadata) == metadata
    read = {key: source.read(key) for key in source.entries}
    assert same(dict(sorted(read.items())), dict(sorted(found.items())))
    assert same(dict(sorted(load_file(path).items())), dict(sorted(found.items())))


MEASURED = st.none() | st.floats(allow_nan=False)
NUMBERS = st.fixed_dictionaries(
    {},
    optional={
        "sensitivity": REALS,
        "sqnr_db": MEASURED,
        "change": MEASURED,
        "damping": REALS,
        "dead": COUNTS,
        "loss": MEASURED,
        "nearest_loss": MEASURED,
        "of a later release": REALS | COUNTS,
    },
)
LAYERS = st.builds(
    LayerPlan,
    name=NAMES,
    kind=st.sampled_from(["Linear", "Conv2d"]),
    shape=st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
    action=st.sampled_from(ACTIONS),
    reason=st.just("") | NAMES,
    scheme=st.sampled_from([*SCHEMES]) | NAMES,
    amax=REALS,
    input_amax=REALS,
).map(lambda layer: layer if layer.action == QUANTIZE else replace(layer, scheme=""))
MEASURED_LAYERS = st.builds(lambda layer, numbers: layer.measured(**numbers), LAYERS, NUMBERS)
PLANS = st.builds(
    Plan,
    st.sampled_from(["v1", "v2", "comfy"]),
    st.just("") | NAMES,
    st.just("") | NAMES,
    st.just("") | NAMES,
    st.lists(MEASURED_LAYERS, max_size=4).map(tuple),
)


@given(PLANS, st.sampled_from([None, 1, 4]))
@EXAMPLES
def test_a_plan(plan, indent):
    assert Plan.from_json(plan.to_json(indent)) == plan


@given(PLANS)
@EXAMPLES
def test_a_header(path, plan):
    save_file({"a": torch.ones(2)}, path, {"title": "x"})
    metadata = header_metadata(FileSource(path), plan, None)
    assert declared_format(metadata, "x.safetensors") == plan.file_format
    assert Plan.from_json(metadata[PLAN_KEY]) == plan
    assert set(metadata) == {"title", HEADER_KEY, PLAN_KEY}
