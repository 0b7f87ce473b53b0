"""Calibration prompts: the shipped list is varied, turns go round, seeds never meet."""

from __future__ import annotations

import re
import unicodedata
from itertools import combinations

import pytest
from hswq.hswq_core.calibration.prompts import SEEDS, prompts_in, shipped_prompts, turn
from reference_models.captions import WORDS
from reference_models.prompts import EVALUATION_SEED, MOST, evaluation_prompts


def words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def test_128_prompts_of_all_lengths():
    prompts = shipped_prompts()
    assert len(prompts) == 128
    assert all(prompt == prompt.strip() and prompt.isprintable() and prompt for prompt in prompts)
    lengths = sorted(len(words(prompt)) for prompt in prompts if prompt.isascii())
    assert lengths[0] == 3
    assert 60 <= lengths[-1] <= 75  # about as long as people write them
    assert sum(length < 8 for length in lengths) >= 16
    assert sum(length > 20 for length in lengths) >= 12


def test_some_are_in_other_languages_and_scripts():
    scripts = {unicodedata.name(letter).split()[0] for letter in "".join(shipped_prompts()) if letter.isalpha()}
    assert {"LATIN", "HIRAGANA", "CJK", "HANGUL", "CYRILLIC", "ARABIC"} <= scripts


def test_no_two_are_alike():
    sets = [set(words(prompt)) for prompt in shipped_prompts()]
    assert len({tuple(sorted(each)) for each in sets}) == 128
    for one, other in combinations(sets, 2):
        assert len(one & other) <= 0.6 * min(len(one), len(other)), (one, other)


def test_no_prompt_or_seed_is_one_that_methods_are_judged_by():
    judged = {tuple(words(each.caption)) for each in evaluation_prompts(MOST)}
    assert judged.isdisjoint(tuple(words(prompt)) for prompt in shipped_prompts())
    captions = set(WORDS) | {"a", "to", "and", "on"}
    assert all(not set(words(prompt)) <= captions for prompt in shipped_prompts())
    seeds = {turn(index, shipped_prompts()).seed for index in range(8 * 128)}
    assert seeds.isdisjoint(range(EVALUATION_SEED, EVALUATION_SEED + MOST))


def test_every_prompt_has_its_turn_then_again_with_other_seeds():
    prompts = shipped_prompts()
    turns = [turn(index, prompts) for index in range(3 * len(prompts))]
    assert tuple(each.prompt for each in turns) == prompts * 3
    assert len({each.seed for each in turns}) == len(turns)
    assert all(0 <= each.seed < SEEDS for each in turns)


@pytest.mark.parametrize(
    ("index", "said"),
    [(0, "1 of 2: a cat"), (1, "2 of 2: a dog"), (3, "2 of 2, second round: a dog"), (4, "1 of 2, round 3: a cat")],
)
def test_it_says_whose_turn_it_is(index, said):
    assert turn(index, ("a cat", "a dog")).describe() == said


def test_the_last_index_is_a_turn_too():
    last = turn(SEEDS - 1, ("a cat",))
    assert (last.prompt, last.number, last.count) == ("a cat", 1, 1)
    assert last.seed != turn(0, ("a cat",)).seed


def test_ones_own_prompts_come_one_a_line():
    assert prompts_in("  a cat \r\n\n\t\n猫\n") == ("a cat", "猫")
    assert prompts_in("") == prompts_in(" \n\n") == shipped_prompts()
