"""API keys: shown once, kept as hashes, in a file for its owner's eyes."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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


def test_who_adds_at_the_same_time_waits_for_his_turn(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        secrets = list(pool.map(add_key, [file] * 20, [f"user{i}" for i in range(20)]))
    assert len({key.sha256 for key in read_keys(file)}) == 20
    assert all(KeyRing(file).find(secret) for secret in secrets)


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add_key(file, "ada")
    file.chmod(0o640)
    add_key(file, "bob")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is no folder"):
        add_key(tmp_path / "nowhere" / "keys.json", "ada")


def test_a_removed_key_ends_though_the_file_could_not_be_read_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dsv3.server.keys._LOOK_EVERY", 0.0)
    file = tmp_path / "keys.json"
    ada, bob = add_key(file, "ada"), add_key(file, "bob")
    ring = KeyRing(file)
    remove_key(file, "ada")
    monkeypatch.setattr("dsv3.server.keys.read_keys", _unreadable)
    assert ring.find(ada) is not None and ring.find(bob) is not None
    assert len([r for r in caplog.records if "stay as they were" in r.getMessage()]) == 1
    monkeypatch.undo()
    monkeypatch.setattr("dsv3.server.keys._LOOK_EVERY", 0.0)
    assert ring.find(ada) is None and ring.find(bob) is not None


def _unreadable(path: Path) -> list:
    raise UserError(f"{path} cannot be read: it is held")


def test_a_change_that_keeps_length_and_time_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.server.keys._LOOK_EVERY", 0.0)
    file = tmp_path / "keys.json"
    ada = add_key(file, "ada")
    ring, before = KeyRing(file), file.stat()
    file.write_text(file.read_text().replace("ada", "eve"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = ring.find(ada)
    assert found is not None and found.name == "eve"


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
