"""The table of methods: what users choose, with which settings, and what a file's name says of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hswq.hswq_core.errors import SettingError
from hswq.hswq_core.methods.hswq import HSWQSettings
from hswq.hswq_core.methods.learned import LearnedOptions
from hswq.hswq_core.methods.method import SESSION, Method, NoBudget, method_named, require_options, require_session
from hswq.hswq_core.methods.nearest import plan_nearest
from hswq.hswq_core.methods.table import METHODS
from hswq.hswq_core.plan.encoding import Encoding
from hswq.hswq_core.plan.formats import format_named

DEFAULTS = {"hswq": HSWQSettings(), "learned": LearnedOptions(), "nearest": NoBudget()}


@pytest.fixture
def session(session_of, stats_of):
    return session_of({"l": torch.ones(4, 4)}, {"l": stats_of("Linear", (4, 4), calls=40)})


def test_the_three_methods_and_what_they_need():
    assert list(METHODS) == ["hswq", "learned", "nearest"]
    assert {name: row.needs for name, row in METHODS.items()} == {
        "hswq": {SESSION},
        "learned": set(),
        "nearest": set(),
    }
    assert [name for name, row in METHODS.items() if row.own_codes] == ["learned"]
    assert not any(row.options for row in METHODS.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_found_by_its_name(name):
    assert method_named(name, METHODS) is METHODS[name]
    assert METHODS[name].name == name


@pytest.mark.parametrize("name", ["", "best", "HSWQ", "../nearest"])
def test_another_name_is_an_error_that_lists_them(name):
    with pytest.raises(SettingError, match=r"method.*hswq or learned or nearest"):
        method_named(name, METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_found_by_their_names_and_the_default_where_one_is_missing(name):
    assert METHODS[name].chosen(object()) == DEFAULTS[name]
    everything = SimpleNamespace(keep_ratio=0.5, iterations=3, samples=16, seed=7, text="of someone else")
    chosen = {"hswq": HSWQSettings(0.5), "learned": LearnedOptions(3, 16, 7), "nearest": NoBudget()}
    assert METHODS[name].chosen(everything) == chosen[name]


def test_a_setting_out_of_range_is_an_error_that_names_it():
    with pytest.raises(SettingError, match=r"keep_ratio: got 1\.5"):
        METHODS["hswq"].chosen(SimpleNamespace(keep_ratio=1.5))
    with pytest.raises(SettingError, match="samples: got 0"):
        METHODS["learned"].chosen(SimpleNamespace(samples=0))


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_texts_and_bytes(name):
    assert METHODS[name].chosen(object()).text == ("0.25" if name == "hswq" else "")
    assert METHODS[name].chosen(object()).extra_bytes(10**9, 100) == 0


def test_a_files_name_says_the_method_or_the_session_it_was_made_by(session):
    assert METHODS["nearest"].tail(NoBudget(), None) == "nearest"
    assert METHODS["learned"].tail(LearnedOptions(), None) == "learned"
    assert METHODS["hswq"].tail(HSWQSettings(0.34), session) == "hswq_r40_0.34"


def test_a_session_that_is_needed_must_be_there(session):
    assert require_session("hswq", session) is session
    with pytest.raises(SettingError, match=r"session: got none.*method hswq.*learned or nearest"):
        require_session("hswq", None)


def test_options_of_an_encoding_are_for_methods_that_honour_them():
    able = Method("able", plan_nearest, options=True)
    methods = {**METHODS, "able": able}
    plain = [Encoding(format_named(name)) for name in ("comfy", "v2", "v1")]
    asked = [Encoding(format_named("v2"), granularity="channel"), Encoding(format_named("comfy"), fast_matmul=3.0)]
    for encoding in (*plain, *asked):
        require_options(able, encoding, methods)
    for encoding in plain:
        require_options(METHODS["nearest"], encoding, methods)
    for encoding in asked:
        with pytest.raises(SettingError, match=r"scale_per, fast_matmul.*method nearest.*expected method able"):
            require_options(METHODS["nearest"], encoding, methods)
