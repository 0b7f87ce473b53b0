from __future__ import annotations

import pytest
from hswq.hswq_core.errors import FileError, HSWQError, LayerError, SessionError, SettingError


def test_the_message_says_what_is_wrong_what_was_got_expected_and_what_to_do():
    error = SettingError("keep_ratio", got=1.5, expected="0 to 1", remedy="Use 0.25.")
    assert str(error) == "keep_ratio: got 1.5, expected 0 to 1. Use 0.25."
    assert error.what == "keep_ratio"


@pytest.mark.parametrize("kind", [SettingError, SessionError, LayerError, FileError])
def test_one_except_clause_catches_every_error_of_the_pack(kind):
    with pytest.raises(HSWQError):
        raise kind("x", got=1, expected=2, remedy="y")
