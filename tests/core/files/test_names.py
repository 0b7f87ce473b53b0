from __future__ import annotations

from pathlib import Path

import pytest
from hswq.hswq_core.errors import SettingError
from hswq.hswq_core.files.names import MAX_BYTES, MAX_LENGTH, check_name, describe, free_name, output_path, session_path
from hypothesis import given, settings
from hypothesis import strategies as st

HOSTILE = [
    "",
    " ",
    ".",
    "..",
    "../evil",
    "..\\evil",
    "a/b",
    "a\\b",
    "/etc/passwd",
    "C:\\Windows\\evil",
    "C:evil",
    "\\\\server\\share\\evil",
    "//server/share/evil",
    "nul\x00byte",
    "new\nline",
    "escape\x1b[2J",
    "delete\x7f",
    "x" * 10_000,
    "x" * (MAX_LENGTH + 1),
    ".hidden",
    "trailing.",
    "trailing ",
    " leading",
    "right\u202eto-left",
    "zero\u200bwidth",
    "joiner\u200d",
    "bom\ufeff",
    "no-break\u00a0space",
    "lone\ud800surrogate",
    "star*",
    "question?",
    'quote"',
    "pipe|",
    "<angle>",
    "CON",
    "con",
    "nul",
    "Aux.txt",
    "prn.tar.gz",
    "COM1",
    "lpt9.pt",
    "com\u00b9",  # Windows reserves the superscript digits too
    "LPT\u00b3.log",
    "CONIN$",
    "CON .txt",
    "nul . ",
    "\uff23\uff2f\uff2e",  # full-width CON
    "\uff0e\uff0e",  # full-width dots
    "\u2025",  # two dots in one
    "\uff0e\uff0e\uff0fevil",
    "a\uff0fb",  # full-width solidus
    "a\uff3cb",  # full-width reverse solidus
    "a\ufe68b",  # small reverse solidus
    "a\u2044b",  # fraction slash
    "a\u2215b",  # division slash
    "a\u29f8b",  # big solidus
    "a\u29f5b",  # reverse solidus operator
    "c\uff1aevil",  # full-width colon
    "c\ua789evil",  # a letter like a colon
    "\u3164",  # Hangul filler: a letter drawn as nothing
    "blank\u2800",
    "isolate\u2067",
    "\u3000",  # ideographic space
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_session_name_is_refused(name, tmp_path):
    with pytest.raises(SettingError, match="Session name"):
        session_path(tmp_path, name)


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ("", "a/b", "a\\b")], ids=ascii)
def test_a_hostile_prefix_is_refused_whole_as_folder_and_as_last_part(name, tmp_path):
    for prefix in (name, f"{name}/x", f"x/{name}"):
        with pytest.raises(SettingError, match="filename_prefix"):
            output_path(tmp_path, prefix, "stem")


@pytest.mark.parametrize("prefix", ["a//b", "/a", "a/", "a/../b", "a/./b", "a\\..\\..\\b"])
def test_a_prefix_with_an_empty_or_dotted_part_is_refused(prefix, tmp_path):
    with pytest.raises(SettingError):
        output_path(tmp_path, prefix, "stem")


@pytest.mark.parametrize("name", ["session_01", "v1.5", "my model (2)", "x" * MAX_LENGTH, "común", "モデル", "console"])
def test_a_plain_name_is_kept_as_it_is(name):
    assert check_name(name, "Session name") == name


# What remains of a file name's 255 bytes beside the suffix of the temporary file.
ROOM = 255 - len(".12345678.hswq.tmp")


@pytest.mark.parametrize("letter", ["x", "é", "モ", "🙂"])
def test_every_accepted_session_name_fits_into_a_file_name(letter, tmp_path):
    """File systems count bytes, not characters."""
    for length in range(1, MAX_LENGTH + 1):
        try:
            path = session_path(tmp_path, letter * length)
        except SettingError:
            assert length > 40
            return
        assert len(path.name.encode()) <= ROOM
    assert letter in "xé"


def test_an_output_name_that_no_file_system_takes_is_refused_before_the_work(tmp_path):
    fits = ROOM - len(".safetensors")
    assert len(output_path(tmp_path, "", "x" * fits).name) == ROOM
    with pytest.raises(SettingError, match="238 bytes"):
        output_path(tmp_path, "", "x" * (fits + 1))
    with pytest.raises(SettingError, match="bytes"):
        output_path(tmp_path, "p" * MAX_LENGTH, "モ" * 50)


def test_the_message_shows_the_start_of_a_long_name_only():
    with pytest.raises(SettingError) as error:
        check_name("x" * 10_000, "Session name")
    assert len(str(error.value)) < 500


def test_session_path(tmp_path):
    assert session_path(tmp_path, "session_01") == tmp_path / "session_01.pt"
    assert session_path(tmp_path, "v1.5") == tmp_path / "v1.5.pt"


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("", "model_hswq_r40_0.25_v2.safetensors"),
        ("mine", "mine_model_hswq_r40_0.25_v2.safetensors"),
        ("v1.5", "v1.5_model_hswq_r40_0.25_v2.safetensors"),
        ("sdxl/mine", "sdxl/mine_model_hswq_r40_0.25_v2.safetensors"),
        ("a\\b\\mine", "a/b/mine_model_hswq_r40_0.25_v2.safetensors"),
    ],
)
def test_output_path(prefix, expected, tmp_path):
    stem = f"model_{describe(40, '0.25')}_v2"
    assert output_path(tmp_path, prefix, stem) == tmp_path / expected


def test_output_path_never_names_an_existing_file(tmp_path):
    for name in ("stem.safetensors", "stem_2.safetensors", "stem_4.safetensors"):
        (tmp_path / name).touch()
    assert output_path(tmp_path, "", "stem") == tmp_path / "stem_3.safetensors"


def link(path: Path, target: Path) -> None:
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("this system lets nobody make links")


@pytest.mark.parametrize("suffix", [".pt", ".states.safetensors", ".pt.lock", ".work"])
def test_a_session_none_of_whose_files_may_be_a_link_out_of_the_folder(suffix, tmp_path):
    """What is in a work folder is deleted, whose ever it is."""
    folder, elsewhere = tmp_path / "stats", tmp_path / "elsewhere"
    folder.mkdir()
    link(folder / f"mine{suffix}", elsewhere)
    with pytest.raises(SettingError, match=r"Session name: got mine.*link that leads out of"):
        session_path(folder, "mine")
    assert session_path(folder, "other") == folder / "other.pt"
    link(folder / f"round{suffix}", folder / f"round{suffix}")
    with pytest.raises(SettingError, match="link"):
        session_path(folder, "round")


def test_links_inside_the_folder_and_the_folder_as_a_link_are_the_users_own(tmp_path):
    real, folder = tmp_path / "second disk", tmp_path / "output"
    (real / "sub").mkdir(parents=True)
    link(folder, real)
    (real / "first.pt").touch()
    link(folder / "mine.pt", real / "first.pt")
    link(folder / "named", folder / "sub")
    assert session_path(folder, "mine") == folder / "mine.pt"
    assert output_path(folder, "named/x", "stem") == folder / "named" / "x_stem.safetensors"


def test_a_prefix_through_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "output"
    folder.mkdir()
    link(folder / "away", tmp_path)
    for prefix in ("away/x", "away/sub/x"):
        with pytest.raises(SettingError, match=r"filename_prefix.*link that leads out of"):
            output_path(folder, prefix, "stem")


def test_a_link_that_leads_nowhere_is_in_the_way_too(tmp_path):
    link(tmp_path / "stem.safetensors", tmp_path / "nowhere")
    assert output_path(tmp_path, "", "stem") == tmp_path / "stem_2.safetensors"


def test_a_prefix_has_few_parts(tmp_path):
    assert len(output_path(tmp_path, "a/" * 7 + "x", "stem").relative_to(tmp_path).parts) == 8
    for prefix in ("a/" * 8 + "x", "a/" * 5000 + "x"):
        with pytest.raises(SettingError, match=r"filename_prefix.*at most 8"):
            output_path(tmp_path, prefix, "stem")


@given(st.text(max_size=120), st.text(max_size=120))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_no_text_leaves_the_folder(tmp_path_factory, session, prefix):
    folder = tmp_path_factory.getbasetemp() / "output"
    try:
        path = session_path(folder, session)
    except SettingError:
        pass
    else:
        assert path.parent == folder
        assert path.resolve() == folder.resolve() / path.name
    try:
        path = output_path(folder, prefix, "stem")
    except SettingError:
        return
    assert ".." not in path.parts
    assert path.resolve().is_relative_to(folder.resolve())


@pytest.mark.parametrize(
    ("name", "taken", "free"),
    [
        ("session_01", {"session_01"}, "session_02"),
        ("session_01", set(), "session_02"),
        ("session_01", {"session_02", "session_03"}, "session_04"),
        ("session_9", set(), "session_10"),
        ("session_099", set(), "session_100"),
        ("foo", {"foo"}, "foo_02"),
        ("foo", {"foo", "foo_02"}, "foo_03"),
        ("sdxl_2024", set(), "sdxl_2024_02"),
        ("v1.5", set(), "v1.5_02"),
    ],
)
def test_a_free_name(name, taken, free):
    assert free_name(name, taken.__contains__) == free


@pytest.mark.parametrize("name", ["x" * MAX_LENGTH, "\U0001f600" * (MAX_BYTES // 4), "x" * (MAX_LENGTH - 3) + "_99"])
def test_a_free_name_is_never_too_long(name):
    taken = {name}
    for _ in range(3):
        free = check_name(free_name(name, taken.__contains__), "name")
        assert free not in taken
        taken.add(free)
