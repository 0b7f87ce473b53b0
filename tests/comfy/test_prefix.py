"""Skipping the blocks before a changed layer gives the same numbers with less work."""

from __future__ import annotations

import pytest
import torch
from rig import tiny
from rig.inprocess import load_comfy, load_model, sample

pytestmark = pytest.mark.comfy

KINDS = {"flux-tiny": "single_blocks.1.linear1", "sdxl-small": "output_blocks.3.1.transformer_blocks.0.attn1.to_q"}


@pytest.fixture(scope="module", params=KINDS)
def recorded(request, tmp_path_factory):
    """(MODEL, states of two shapes, a layer near the end)."""
    load_comfy()
    from hswq.hswq_core.calibration.states_file import load_states, states_path
    from hswq.loader.calibration.model import calibrated
    from hswq.loader.model import inspect_model

    path = tmp_path_factory.mktemp("prefix") / "session.pt"
    with torch.inference_mode():
        model = load_model(tiny.make(request.param))
        watched = calibrated(model, path, 1000, lambda _line: None, states=4)
        for size in (8, 16):
            sample(watched, steps=1, size=size)
        states = load_states(states_path(path), inspect_model(model).fingerprint, 4).states
        yield model, states, KINDS[request.param]


@pytest.fixture
def replay(recorded):
    from hswq.loader.replay.replay import Replay

    model, states, _ = recorded
    made = Replay(model, states)
    assert len(made.batches) == 2
    with torch.inference_mode(), made.loaded():
        yield made


def delta_of(replay, name: str):
    from hswq.loader.replay.replay import Delta

    weight = replay.modules[name].weight
    return Delta(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std())


def test_numbers_are_the_same(replay, recorded):
    from hswq.loader.replay.prefix import Prefix

    name = recorded[2]
    prefix = Prefix(replay)
    assert len(prefix.blocks) > 5
    names = list(replay.modules)
    for layer in (names[0], name, names[-1]):
        made = delta_of(replay, layer)
        wanted = replay.change(prefix.reference, {layer: lambda made=made: made})
        assert prefix.change(layer, made) == wanted > 0
    assert all("forward" not in vars(module) for module in prefix.modules.values())


def test_only_blocks_from_the_changed_one_on_run(replay, recorded, counted):
    from hswq.loader.replay.prefix import Prefix

    name = recorded[2]
    prefix = Prefix(replay)
    own = next(block for block in prefix.blocks if name.startswith(f"{block}."))
    before = prefix.blocks[: prefix.blocks.index(own)]
    assert before
    with counted(replay) as counts:
        prefix.change(name, delta_of(replay, name))
    ran = {layer for layer, count in counts.items() if count}
    assert name in ran
    assert not any(layer.startswith(f"{block}.") for layer in ran for block in before)


def test_under_a_memory_limit_fewer_blocks_answer_to_the_same_effect(replay, recorded, monkeypatch, counted):
    import comfy.model_management
    from hswq.loader.replay import prefix

    name = recorded[2]
    whole = prefix.Prefix(replay)
    free = comfy.model_management.get_free_memory(replay.model.load_device)
    half = sum(
        t.nbytes
        for block in whole.blocks[: len(whole.blocks) // 2]
        for t in prefix.tensors_in(whole._record.given[block][0])
    )
    sizes = [sum(state.tensors["x"].numel() for state in batch) for batch in replay.batches]
    monkeypatch.setattr(prefix, "MEMORY_SHARE", half / free * sum(sizes) / sizes[0])
    monkeypatch.setattr(
        comfy.model_management,
        "get_free_memory",
        lambda _device=None, both=False: (free, free) if both else free,
    )
    few = prefix.Prefix(replay)
    assert 0 < len(few.blocks) < len(whole.blocks)
    assert few.blocks == whole.blocks[: len(few.blocks)]
    made = delta_of(replay, name)
    with counted(replay) as counts:
        found = few.change(name, made)
    assert found == whole.change(name, made)
    inside = [layer for layer in counts for block in few.blocks if layer.startswith(f"{block}.")]
    assert inside
    assert not any(counts[layer] for layer in inside)


def test_a_model_whose_blocks_do_more_than_answer_runs_whole(replay, recorded, monkeypatch):
    from hswq.loader.replay.prefix import Prefix

    blocks = Prefix(replay).blocks
    first, last = (dict(replay.model.model.diffusion_model.named_modules())[blocks[i]] for i in (1, -1))
    ran = []
    inner, outer = first.forward, last.forward
    monkeypatch.setattr(first, "forward", lambda *args, **kwargs: (ran.append(1), inner(*args, **kwargs))[1])

    def twice(*args, **kwargs):
        found, extra = outer(*args, **kwargs), 1.0 + len(ran)
        ran.clear()
        return found * extra

    monkeypatch.setattr(last, "forward", twice)
    assert Prefix(replay).blocks == []
    name = recorded[2]
    made = delta_of(replay, name)
    prefix = Prefix(replay)
    assert prefix.change(name, made) == replay.change(prefix.reference, {name: lambda: made})


def test_cancel_is_answered_within_a_call(replay, recorded, counted):
    """At the next layer, and not after a call that may take a minute."""
    import comfy.model_management

    handle = replay.modules[recorded[2]].register_forward_hook(
        lambda *_: comfy.model_management.interrupt_current_processing(True)
    )
    try:
        with counted(replay) as counts, pytest.raises(comfy.model_management.InterruptProcessingException):
            replay.run()
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert counts[recorded[2]] == 1
    assert 0 in counts.values()
