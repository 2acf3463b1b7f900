"""The tokenizer of a checkpoint folder: ids, special tokens wherever they are named, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import CheckpointError, UserError
from dsv3.text import Tokenizer
from tests.text.toy import BOS, EOS, PAD, USER, save, train

TOKENIZER = Tokenizer(train(), {"bos_token": BOS, "eos_token": EOS})


@given(st.text(st.characters(codec="utf-8")))
def test_plain_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, allow_special=False), skip_special_tokens=False) == text


def test_control_tokens_only_where_allowed() -> None:
    user = TOKENIZER.backend.token_to_id(USER)
    assert TOKENIZER.encode(USER + "hi")[0] == user
    plain = TOKENIZER.encode(USER + "hi", allow_special=False)
    assert user not in plain
    assert TOKENIZER.decode(plain) == USER + "hi"


def test_bos_is_put_in_front_once_and_only_when_asked() -> None:
    assert TOKENIZER.encode("a fox", add_bos=True) == [TOKENIZER.bos_token_id, *TOKENIZER.encode("a fox")]
    assert TOKENIZER.bos_token_id not in TOKENIZER.encode("a fox")
    assert Tokenizer(train()).encode("a", add_bos=True) == Tokenizer(train()).encode("a"), "no BOS to add"


def test_decode_leaves_special_tokens_out_unless_asked() -> None:
    ids = TOKENIZER.encode(BOS + "a fox" + EOS)
    assert TOKENIZER.decode(ids) == "a fox"
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == BOS + "a fox" + EOS


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UserError, match="not valid Unicode"):
        TOKENIZER.encode("a\ud800")


def test_special_tokens_from_tokenizer_config(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(save(tmp_path))
    names = [tokenizer.backend.id_to_token(i or 0) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    assert names == [BOS, EOS]
    assert tokenizer.decode([tokenizer.pad_token_id or 0], skip_special_tokens=False) == PAD
    assert tokenizer.vocab_size == train().get_vocab_size()


def test_special_tokens_from_special_tokens_map(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": BOS, "eos_token": {"content": EOS}})
    )
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, None)


def test_special_tokens_from_the_models_config_alone(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_every_id_that_ends_a_text_is_known(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 1]}))
    assert Tokenizer.from_pretrained(tmp_path).eos_token_ids == (1, 4)


def test_bos_that_is_switched_off_stays_off(tmp_path: Path) -> None:
    save(tmp_path, bos_token=None)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0}))
    assert Tokenizer.from_pretrained(tmp_path).bos_token_id is None


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "neither tokenizer.json nor tiktoken.model"),
        ({"tokenizer.json": '{"version": "1.0", '}, "tokenizer.json is broken"),
        ({"tokenizer.json": "", "tokenizer_config.json": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer.json": "", "tokenizer_config.json": "[]"}, "tokenizer_config.json holds a list"),
        ({"tokenizer.json": train().to_str(), "tokenizer_config.json": '{"eos_token": "</s>"}'}, "'</s>'"),
    ],
)
def test_missing_and_broken_files_say_so_in_one_line(
    tmp_path: Path, files: dict[str, str], says: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=says) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_other_kinds_of_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.decoder = tokenizers.decoders.Metaspace()
    with pytest.raises(CheckpointError, match="Metaspace"):
        Tokenizer.from_pretrained(save(tmp_path, words))
