"""API keys: shown once, kept as hashes, in a file for its owner's eyes."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.server.keys import KeyRing, add_key, read_keys, remove_key


def test_only_a_hash_is_kept_in_a_file_for_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secret = add_key(file, "ada")
    assert len(secret.removeprefix("sk-dsv3-")) == 43, "256 bits in base64"
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert KeyRing(file).find(secret) == read_keys(file)[0]
    assert KeyRing(file).find(secret + "x") is None
    assert KeyRing(file).find("ü\udcff") is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]


def test_a_name_has_one_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    first = add_key(file, "ada")
    with pytest.raises(UserError, match="'ada' has a key"):
        add_key(file, "ada")
    assert add_key(file, "bob") != first
    remove_key(file, "ada")
    assert [key.name for key in read_keys(file)] == ["bob"]
    with pytest.raises(UserError, match=r"'ada' has no key .* those of bob"):
        remove_key(file, "ada")


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "x" * 65, "../a"])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="will not do"):
        add_key(tmp_path / "keys.json", name)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"keys": [{}]}', '{"keys": [1]}', '{"keys": 1}',
                json.dumps({"keys": [{"name": "ada", "sha256": "abc"}]}),
                json.dumps({"keys": [{"name": "a b", "sha256": "0" * 64}]})],
)  # fmt: skip
def test_a_broken_file_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        KeyRing(file)
    assert "\n" not in str(error.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dsv3 keys add NAME --file"):
        KeyRing(tmp_path / "keys.json")
