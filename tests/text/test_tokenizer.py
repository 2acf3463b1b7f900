"""The tokenizer of a checkpoint folder: ids, special tokens wherever they are named, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

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


BYTE_LEVEL = processors.ByteLevel(trim_offsets=False)
WITH_BOS = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)])


@pytest.mark.parametrize(
    ("post_processor", "flag", "begins"),
    [
        pytest.param(BYTE_LEVEL, True, True, id="DeepSeek-V3"),
        pytest.param(BYTE_LEVEL, False, False, id="switched off"),
        pytest.param(BYTE_LEVEL, None, False, id="nothing said"),
        pytest.param(None, None, False, id="no post-processor"),
        pytest.param(WITH_BOS, None, True, id="a post-processor that adds it"),
        pytest.param(WITH_BOS, False, False, id="the flag counts first"),
    ],
)
def test_bos_begins_a_text_where_it_does_in_transformers(
    tmp_path: Path, post_processor: processors.PostProcessor | None, flag: bool | None, begins: bool
) -> None:
    backend = train()
    if post_processor is not None:
        backend.post_processor = post_processor
    flags = {} if flag is None else {"add_bos_token": flag}
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, **flags)
    tokenizer = Tokenizer.from_pretrained(save(tmp_path, backend, add_bos_token=flag))
    assert tokenizer.add_bos_token is begins
    assert tokenizer.encode("a fox", add_bos=tokenizer.add_bos_token) == theirs("a fox")["input_ids"]


def test_a_text_that_brings_its_bos_gets_no_second() -> None:
    assert TOKENIZER.encode(BOS + "a fox", add_bos=True) == TOKENIZER.encode("a fox", add_bos=True)


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
        ({"tokenizer.json": train().to_str(), "tokenizer_config.json": "[" * 100_000}, "is not valid JSON"),
        ({"tokenizer.json": train().to_str(), "generation_config.json": "[" * 100_000}, "is not valid JSON"),
        (
            {"tokenizer.json": train().to_str(), "chat_template.jinja": "caf\xe9"},
            "chat_template.jinja is not UTF-8",
        ),
    ],
)
def test_missing_and_broken_files_say_so_in_one_line(
    tmp_path: Path, files: dict[str, str], says: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="latin-1" if name.endswith(".jinja") else "utf-8")
    with pytest.raises(CheckpointError, match=says) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "config.json",
    ],
)
def test_files_that_cannot_be_read_are_not_called_broken(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()  # the administrator, who may run this, may read whatever is a file
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(error.value) == f"{tmp_path / name} cannot be read: Is a directory"


def test_other_kinds_of_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.decoder = tokenizers.decoders.Metaspace()
    with pytest.raises(CheckpointError, match="Metaspace"):
        Tokenizer.from_pretrained(save(tmp_path, words))
