from __future__ import annotations

import random

import pytest
import torch
from hswq.hswq_core.calibration.split import ENOUGH_PROMPTS, split_states
from hswq.hswq_core.calibration.states import State
from hswq.hswq_core.errors import SessionError


def session(prompts: int, calls: int) -> list[State]:
    """States in order of key, prompts mixed."""
    rng = random.Random(0)
    order = [i % prompts for i in range(prompts * calls)]
    rng.shuffle(order)
    return [
        State(
            i / len(order),
            {"x": torch.rand(1, 2), "sigma": torch.rand(1), "c_crossattn": torch.full((1, 3), float(p))},
            {},
        )
        for i, p in enumerate(order)
    ]


@pytest.mark.parametrize(("prompts", "calls"), [(1, 4), (1, 5), (1, 20), (2, 64), (ENOUGH_PROMPTS, 1), (32, 4)])
def test_every_state_is_in_one_part_and_no_part_is_empty(prompts, calls):
    states = session(prompts, calls)
    split = split_states(states)
    parts = (split.fit, split.decide, split.verify)
    assert all(parts)
    assert [state for part in parts for state in part] == states
    assert len(split.fit) >= len(states) / 2
    assert split.few_prompts == (prompts < ENOUGH_PROMPTS)


def test_a_prompt_is_its_conditioning_whatever_the_call():
    states = session(2, 10)
    assert len({state.prompt for state in states}) == 2
    assert len({state.mark for state in states}) == len(states)


def test_too_few_states_are_an_error_with_a_remedy():
    with pytest.raises(SessionError, match=r"got 3 model calls, expected at least 4.*states at -1"):
        split_states(session(1, 3))
