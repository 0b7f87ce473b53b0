"""Watching group by group, each from where the previous one ended: the same inputs, each block run once."""

from __future__ import annotations

import pytest
import torch
from judge.subject import Subject
from reference_models.architectures import REFERENCES
from rig.inprocess import load_comfy

pytestmark = pytest.mark.comfy

STATES, GROUPS = 4, 5


@pytest.fixture(scope="module", params=sorted(REFERENCES))
def recorded(request):
    """(MODEL, some of its calls)."""
    load_comfy()
    subject = Subject(REFERENCES[request.param], 1, states=STATES)
    from hswq.loader.job import Job

    with torch.inference_mode():
        yield subject.model, Job.open(subject.model, None, None, subject.session).states()


@pytest.fixture
def replay(recorded, monkeypatch):
    """A replay with one call per batch."""
    from hswq.loader.replay import replay

    monkeypatch.setattr(replay, "BATCH_ELEMENTS", 1)
    made = replay.Replay(*recorded)
    assert len(made.batches) == STATES
    with torch.inference_mode(), made.loaded():
        yield made


def groups_of(replay) -> list[list[str]]:
    """All layers in call order, in groups that end within blocks as well as between them."""
    from hswq.loader.model_aware.gather import shared_inputs

    names = list(shared_inputs(replay, replay.modules).leader)
    size = -(-len(names) // GROUPS)
    return [names[start : start + size] for start in range(0, len(names), size)]


def watched(replay, group: list[str]) -> dict[str, list[torch.Tensor]]:
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in group}
    replay.watch({name: lambda x, name=name: seen[name].append(x.clone()) for name in group}, last=group[-1])
    return seen


def same(a: dict[str, list[torch.Tensor]], b: dict[str, list[torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        len(a[name]) == len(b[name]) == STATES and all(map(torch.equal, a[name], b[name])) for name in a
    )


def test_each_group_sees_what_whole_calls_show_it(replay):
    from hswq.loader.replay.relay import Relay

    relay, groups = Relay.of(replay), groups_of(replay)
    for group in groups:
        assert same(watched(relay, group), watched(replay, group))
    assert relay._works
    assert all("forward" not in vars(module) for module in relay._blocks.values())
    assert not any(module._forward_hooks for module in relay._blocks.values())


def test_calls_run_each_block_once(replay, counted):
    """All but the first call, which also runs in full for each group."""
    from hswq.loader.replay.relay import Relay

    relay, groups = Relay.of(replay), groups_of(replay)
    with counted(replay) as counts:
        for group in groups:
            watched(relay, group)
    # A layer within a block: a layer that is itself a block is called, and returns its cached answer.
    first = next(n for n in groups[0] if any(n.startswith(f"{block}.") for block in relay._kept[0].answers))
    assert counts[first] == STATES + len(groups)
    with counted(replay) as counts:
        for group in groups:
            watched(replay, group)
    assert counts[first] == STATES * len(groups)


def test_layers_before_the_front_are_watched_from_the_beginning(replay):
    """As after running out of memory, when a group is watched again in halves."""
    from hswq.loader.replay.relay import Relay

    relay, groups = Relay.of(replay), groups_of(replay)
    for group in (groups[0], groups[2], groups[1], groups[3], groups[3][1:]):
        assert same(watched(relay, group), watched(replay, group))


def test_calls_beyond_the_memory_run_whole(replay):
    from hswq.loader.replay.relay import BEGINNING, Relay

    relay, groups = Relay.of(replay), groups_of(replay)
    watched(relay, groups[1])
    relay._limit = 1.5 * relay._kept[0].nbytes
    relay._kept = [BEGINNING] * STATES
    watched(relay, groups[1])
    assert [kept is BEGINNING for kept in relay._kept] == [False, False, True, True]
    for group in groups[2:]:
        assert same(watched(relay, group), watched(replay, group))


def test_a_model_whose_blocks_do_more_than_answer_runs_whole(replay, monkeypatch):
    """One block passes something to another outside the model's own code."""
    from hswq.loader.replay.relay import BEGINNING, Relay

    relay, groups = Relay.of(replay), groups_of(replay)
    told: list[float] = []
    early, late = (replay.modules[groups[i][0]] for i in (0, 3))
    inner, outer = early.forward, late.forward

    def telling(x, *args, **kwargs):
        told.append(float(x.float().mean()))
        return inner(x, *args, **kwargs)

    def told_of(x, *args, **kwargs):
        found = outer(x, *args, **kwargs) * (2.0 + told[-1] if told else 1.0)
        told.clear()
        return found

    monkeypatch.setattr(early, "forward", telling)
    monkeypatch.setattr(late, "forward", told_of)
    wanted = []
    for group in groups:
        wanted.append(watched(replay, group))
        told.clear()
    for group, expected in zip(groups, wanted, strict=True):
        assert same(watched(relay, group), expected)
        told.clear()
    assert not relay._works
    assert all(kept is BEGINNING for kept in relay._kept)
