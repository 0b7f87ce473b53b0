"""What a file says about itself, believed only as far as this release understands it."""

from __future__ import annotations

import json

import pytest
from hswq.hswq_core.convert.header import declared_format
from hswq.hswq_core.errors import FileError
from hswq.hswq_core.plan.formats import FORMATS


@pytest.mark.parametrize("metadata", [None, {}, {"modelspec.title": "x"}])
def test_files_of_others_declare_nothing(metadata):
    assert declared_format(metadata, "x.safetensors") is None


@pytest.mark.parametrize("name", FORMATS)
def test_the_declared_format(name):
    assert declared_format({"hswq": json.dumps({"version": 1, "format": name})}, "x.safetensors") == name


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"version": 1}', '{"format": "v2"}', "null"])
def test_a_damaged_entry_is_named(text):
    with pytest.raises(FileError, match=r"File x\.safetensors, header entry hswq: got unreadable.*convert or download"):
        declared_format({"hswq": text}, "x.safetensors")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"version": 2, "format": "v2"}, "version 2, expected version 1"),
        ({"version": "1", "format": "v2"}, "version '1'"),
        ({"version": 1, "format": "v9"}, "format 'v9'"),
    ],
)
def test_a_newer_version_or_format_asks_for_an_update(record, words):
    with pytest.raises(FileError, match=rf"{words}.*Update this node pack"):
        declared_format({"hswq": json.dumps(record)}, "x.safetensors")
