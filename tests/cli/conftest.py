"""A checkpoint to talk to: the `tiny` preset with random weights and a tokenizer, as it would be released."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3.checkpoint.pretrained import DeepseekV3
from dsv3.config import PRESETS
from tests.text.toy import save, train


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train()
    config = PRESETS["tiny"].replace(vocab_size=tokenizer.get_vocab_size())
    model = DeepseekV3(config)
    model.init_weights(1)
    model.save_pretrained(folder)
    save(folder, tokenizer)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "eos_token_id": 1}))
    return folder
