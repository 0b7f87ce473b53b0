from __future__ import annotations

import json
import random

import pytest
import torch
from hswq.hswq_core.calibration import states
from hswq.hswq_core.calibration.states import AUTO, MAX_STATES, Sample, State, capture
from hswq.hswq_core.calibration.states_file import HEADER_KEY, load_states, save_states
from hswq.hswq_core.errors import SessionError
from hswq.hswq_core.model.fingerprint import Fingerprint
from safetensors.torch import load_file, save_file

PRINT = Fingerprint("a" * 64, torch.zeros(4))


def call(batch: int = 3) -> dict[str, object]:
    return {
        "x": torch.randn(batch, 4, 8, 8),
        "sigma": torch.rand(batch),
        "c_crossattn": torch.randn(batch, 5, 6).half(),
        "y": torch.randn(1, 7),
        "control": None,
        "num_tokens": 5,
        "ref_latents": [torch.randn(batch, 4, 2, 2) for _ in range(12)],
        "sample_sigmas": torch.arange(float(batch)),
    }


def state(key: float, mark: float = 0.0) -> State:
    return State(key, {"x": torch.full((1, 2), mark), "sigma": torch.ones(1)}, {})


def keys(sample: Sample) -> list[float]:
    return [s.key for s in sample.states]


def test_a_state_is_one_row_of_a_call_and_gives_its_arguments_back():
    arguments = call()
    kept = capture(arguments, 1, 0.5, whole=frozenset({"sample_sigmas"}))
    again = kept.arguments("cpu")
    assert torch.equal(again["x"], arguments["x"][1:2])
    assert torch.equal(again["sigma"], arguments["sigma"][1:2])
    assert torch.equal(again["c_crossattn"], arguments["c_crossattn"][1:2])
    assert again["c_crossattn"].dtype == torch.float16
    assert torch.equal(again["y"], arguments["y"])  # one for all rows
    assert torch.equal(again["sample_sigmas"], arguments["sample_sigmas"])  # as long as the batch, and no batch
    assert again["num_tokens"] == 5
    assert "control" not in again
    assert len(again["ref_latents"]) == 12
    assert all(torch.equal(a, b[1:2]) for a, b in zip(again["ref_latents"], arguments["ref_latents"], strict=True))


def test_the_middle_of_a_state_is_that_of_all_tensors_of_the_picture_size():
    x, mask = torch.randn(1, 4, 9, 6), torch.randn(1, 1, 9, 6)
    beside = {"sigma": torch.ones(1), "c_crossattn": torch.randn(1, 9, 6, 2), "y": torch.randn(1, 6)}
    whole = State(0.5, {"x": x, "c_concat": mask, **beside}, {"num_tokens": 5})
    middle = whole.cropped(4)
    assert torch.equal(middle.tensors["x"], x[:, :, 2:6, 1:5])
    assert torch.equal(middle.tensors["c_concat"], mask[:, :, 2:6, 1:5])
    assert all(middle.tensors[name] is tensor for name, tensor in beside.items())
    assert (middle.key, middle.constants) == (whole.key, whole.constants)
    assert torch.equal(whole.cropped(7).tensors["x"], x[:, :, 1:8])
    assert whole.cropped(9) is whole
    video = State(0.5, {"x": torch.randn(1, 4, 3, 9, 9), "sigma": torch.ones(1)}, {})
    assert video.cropped(4) is video


def test_a_state_is_a_copy():
    arguments = call()
    kept = capture(arguments, 0, 0.5)
    arguments["x"].zero_()
    assert kept.tensors["x"].any()


@pytest.mark.parametrize("value", [{"output": [torch.ones(1)]}, lambda: None, [torch.ones(1), {}]])
def test_what_cannot_be_kept_makes_no_state(value):
    assert capture({**call(), "control": value}, 0, 0.5) is None


def test_the_smallest_keys_stay():
    sample = Sample(3, rng=random.Random(0))
    drawn = []

    def make(key: float) -> State:
        drawn.append(key)
        return state(key)

    stream = random.Random(0)
    every = [stream.random() for _ in range(50)]
    for _ in range(50):
        sample.offer(make)
    assert keys(sample) == sorted(every)[:3]
    assert len(drawn) < 20  # a call that cannot enter costs nothing


def test_every_call_is_as_likely_to_stay():
    hits = torch.zeros(20)
    for seed in range(2000):
        sample = Sample(5, rng=random.Random(seed))
        for number in range(20):
            sample.offer(lambda key, number=number: state(key, number))
        for kept in sample.states:
            hits[int(kept.tensors["x"][0, 0])] += 1
    # 500 expected, standard deviation 19
    assert (hits - 500).abs().max() < 100


def test_merged_halves_are_the_sample_of_the_whole():
    every = [state(key) for key in torch.rand(40, generator=torch.Generator().manual_seed(1)).tolist()]
    whole, first, second = Sample(8), Sample(8), Sample(8)
    for i, one in enumerate(every):
        whole.add([one])
        (first if i % 3 else second).add([one])
    first.merge(second)
    assert keys(first) == keys(whole) == sorted(s.key for s in every)[:8]


def test_a_part_knows_what_cannot_enter_the_whole():
    part = Sample(4, ceiling=0.1, rng=random.Random(0))
    for _ in range(100):
        part.offer(state)
    assert part.states
    assert all(key < 0.1 for key in keys(part))
    assert Sample(4, ceiling=0.1).ceiling == 0.1


def picture(key: float, side: int) -> State:
    """Of ``side`` x ``side`` latents; a sample holds equal ones once."""
    return State(key, {"x": torch.zeros(1, 4, side, side), "sigma": torch.ones(1)}, {})


@pytest.mark.parametrize(("side", "kept"), [(256, 128), (128, 128), (96, 227), (64, 512), (16, 512)])
def test_of_small_pictures_more_are_kept(side, kept):
    """128 of 128 x 128 latents have 2,097,152 positions: of 96 x 96, 227 have as many, of 64 x 64, 512."""
    sample = _with(Sample(AUTO), *(picture(i / 600, side) for i in range(600)))
    assert keys(sample) == [i / 600 for i in range(kept)]
    assert sample.ceiling == min(kept, 511) / 600  # of a full one the last key


def test_samples_of_pictures_of_two_sizes_merge_to_that_of_all():
    sides = [random.Random(i).choice((32, 96, 160)) for i in range(600)]
    everything = [picture(i / 600, side) for i, side in enumerate(sides)]
    whole = _with(Sample(AUTO), *everything)
    parts = [_with(Sample(AUTO), *everything[i::3]) for i in range(3)]
    for part in parts[1:]:
        parts[0].merge(part)
    assert keys(parts[0]) == keys(whole)
    assert 128 < len(whole.states) < 512


@pytest.mark.parametrize("capacity", [3, AUTO])
def test_the_size_of_a_sample_is_that_of_its_tensors_shared_ones_once(capacity):
    sample, rng = Sample(capacity), random.Random(5)
    for i in range(40):
        like = torch.full((2, 3), float(i % 4))
        made = State(rng.random(), {"x": torch.rand(1, 2, 5), "sigma": torch.ones(1), "a": like, "b": like}, {})
        sample.add([made])
        tensors = {id(t): t for kept in sample.states for t in kept.tensors.values()}
        assert sample.nbytes == sum(t.nbytes for t in tensors.values())
        assert sample.positions == 5 * len(sample.states)
    assert len(sample.states) == (3 if capacity == 3 else 40)


def test_a_picture_that_is_nan_is_not_kept():
    arguments = call()
    arguments["x"][1, 2, 3, 4] = torch.nan
    assert capture(arguments, 1, 0.5) is None
    assert capture(arguments, 0, 0.5) is not None


def test_no_capacity_keeps_nothing():
    sample = Sample(0)
    sample.offer(state)
    sample.merge(_with(Sample(2), state(0.1)))
    assert sample.states == []


def _with(sample: Sample, *states: State) -> Sample:
    for one in states:
        sample.add([one])
    return sample


def test_a_file_gives_the_same_states_back(tmp_path):
    path = tmp_path / "s.states.safetensors"
    sample = _with(Sample(4), *(capture(call(), row, 0.1 * row + 1 / 3) for row in range(3)))
    save_states(sample, PRINT, path)
    again = load_states(path, PRINT, 4)
    assert keys(again) == keys(sample)
    for one, other in zip(sample.states, again.states, strict=True):
        assert one.constants == other.constants
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert keys(load_states(path, PRINT, 2)) == keys(sample)[:2]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_no_file_another_model_and_damage_are_errors_with_a_remedy(tmp_path):
    path = tmp_path / "s.states.safetensors"
    with pytest.raises(SessionError, match=r"got no such file.*states above 0"):
        load_states(path, PRINT, 4)
    save_states(_with(Sample(4), state(0.5)), PRINT, path)
    with pytest.raises(SessionError, match="got model calls of another model"):
        load_states(path, Fingerprint("b" * 64, torch.zeros(4)), 4)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(SessionError, match=r"unreadable file.*Delete s.states.safetensors"):
        load_states(path, PRINT, 4)


def _wrong(header: dict, tensors: dict) -> list[tuple[dict, dict]]:
    one = header["states"][0]
    return [
        ({**header, "version": 2}, tensors),
        ({**header, "states": [one] * (MAX_STATES + 1)}, tensors),
        ({**header, "states": {}}, tensors),
        ({**header, "states": []}, tensors),
        ({**header, "states": [{**one, "constants": {"n": [1]}}]}, tensors),
        ({**header, "states": [{"constants": {}}]}, tensors),
        ({"version": 1}, tensors),
        (header, {"0/x": tensors["0/x"]}),
        (header, {**tensors, "-1/y": torch.ones(1)}),
        (header, {**tensors, "7/y": torch.ones(1)}),
    ]


@pytest.mark.parametrize("number", range(10))
def test_a_header_that_lies_is_an_error(tmp_path, number):
    path = tmp_path / "s.states.safetensors"
    save_states(_with(Sample(4), state(0.5)), PRINT, path)
    header = {
        "version": 1,
        "layout": PRINT.layout,
        "states": [{"key": 0.5, "constants": {}}],
    }
    header, tensors = _wrong(header, load_file(path))[number]
    save_file(tensors, path, metadata={HEADER_KEY: json.dumps(header)})
    with pytest.raises(SessionError, match="unreadable file"):
        load_states(path, PRINT, 4)


def test_a_file_without_the_header_is_an_error(tmp_path):
    path = tmp_path / "s.states.safetensors"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(SessionError, match="KeyError"):
        load_states(path, PRINT, 4)


def prompted(key: float, prompt: int) -> State:
    """A call of its own latent and one of few prompts."""
    context = torch.full((1, 1000), float(prompt), dtype=torch.bfloat16)
    return State(key, {"x": torch.full((1, 2), key), "sigma": torch.ones(1), "c_crossattn": context}, {})


def test_equal_tensors_are_held_and_stored_once(tmp_path):
    sample = Sample(20)
    for i in range(20):
        part = Sample(1)
        part.states.append(prompted(i / 20, i % 2))
        sample.merge(part)
    latents, prompts = 20 * 8 + 4, 2 * 2000
    assert sample.nbytes == latents + prompts
    path = tmp_path / "s.states.safetensors"
    save_states(sample, PRINT, path)
    assert path.stat().st_size < 2 * (latents + prompts) + 4096
    again = load_states(path, PRINT, 20)
    assert again.nbytes == sample.nbytes
    for kept, wanted in zip(again.states, sample.states, strict=True):
        assert set(kept.tensors) == set(wanted.tensors)
        assert all(torch.equal(kept.tensors[name], wanted.tensors[name]) for name in wanted.tensors)


def test_tensors_of_the_same_bytes_but_another_shape_or_dtype_stay_apart():
    zeros = {
        "x": torch.zeros(1, 4),
        "sigma": torch.zeros(1),
        "a": torch.zeros(4),
        "b": torch.zeros(4, dtype=torch.int32),
    }
    sample, part = Sample(4), Sample(4)
    part.states.append(State(0.1, zeros, {}))
    sample.merge(part)
    assert {name: (t.shape, t.dtype) for name, t in sample.states[0].tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in zeros.items()
    }


def test_the_sample_ends_where_its_bytes_do(monkeypatch):
    """The largest keys go, and no later call of such a key is copied at all."""
    monkeypatch.setattr(states, "MAX_BYTES", 5 * 2000 + 200)
    sample, part = Sample(20), Sample(20)
    order = random.Random(1).sample(range(20), 20)
    part.states.extend(prompted(i / 20, i) for i in order)
    sample.merge(part)
    assert keys(sample) == [i / 20 for i in range(5)]
    assert sample.ceiling == 5 / 20
    assert Sample(20, sample.ceiling).ceiling == 5 / 20
