"""The smaller endpoints: models, tokens, embeddings, the page, and the document of all."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

import pytest

from dsv3 import __version__
from dsv3.server import page
from tests.server.fakes import MAX_MODEL_LEN, FakeEngine, client, tokenizer


def test_models_are_the_names_that_are_served() -> None:
    with client(served_model_names=("fox", "deepseek-ai/DeepSeek-V3")) as http:
        found = http.get("/v1/models").json()
        assert [model["id"] for model in found["data"]] == ["fox", "deepseek-ai/DeepSeek-V3"]
        assert found["data"][0]["max_model_len"] == MAX_MODEL_LEN
        assert http.get("/v1/models/deepseek-ai/DeepSeek-V3").json() == found["data"][1]


def test_health_and_version() -> None:
    with client() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.get("/version").json() == {"version": __version__}


def test_tokens_there_and_back() -> None:
    text = "The fox said: 早上好 🙂"
    with client() as http:
        found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert found["tokens"] == tokenizer().encode(text, add_bos=True)
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert found["max_model_len"] == MAX_MODEL_LEN
        bare = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
        assert bare["tokens"] == found["tokens"][1:]
        assert http.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": text}
        assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_long_texts_go_another_way_to_the_same_tokens() -> None:
    text = "The fox said: «hello» \U0001f98a. " * 2000
    with client() as http:
        found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        back = http.post("/detokenize", json={"tokens": found["tokens"][1:]}).json()
    assert found["tokens"][1:] == tokenizer().backend.encode(text, add_special_tokens=False).ids
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) > 20_000
    assert back["prompt"] == text


def test_a_conversation_is_counted_as_it_would_be_asked() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with client() as http:
        found = http.post("/tokenize", json={"messages": messages}).json()
        assert found["tokens"] == tokenizer().encode_chat(messages)
        found = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
        assert found["tokens"] == tokenizer().encode_chat(messages, add_generation_prompt=False)


def test_lm_eval_finds_the_tokenizer() -> None:
    with client() as http:
        info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == tokenizer().special_tokens["eos_token"]
    assert info["chat_template"] is None


def test_embeddings_as_numbers_and_as_base64() -> None:
    with client() as http:
        found = http.post("/v1/embeddings", json={"input": ["fox", "the fox"], "dimensions": None}).json()
        packed = http.post("/v1/embeddings", json={"input": [5, 6, 7], "encoding_format": "base64"}).json()
    lengths = [len(tokenizer().encode(text, add_bos=True)) for text in ("fox", "the fox")]
    assert [entry["embedding"] for entry in found["data"]] == [[float(length), 0.5] for length in lengths]
    assert found["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
    data = base64.b64decode(packed["data"][0]["embedding"])
    assert struct.unpack("<2f", data) == (3.0, 0.5)


def test_embeddings_keep_the_deadline() -> None:
    with client(FakeEngine(delay=5), request_timeout=0.1) as http:
        assert http.post("/v1/embeddings", json={"input": ["a"] * 3}).status_code == 504


def test_embeddings_count_their_deadline_from_the_start() -> None:
    engine = FakeEngine()
    with client(engine, request_timeout=5) as http:
        assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 200
        assert http.get("/metrics").text.count("dsv3_request_duration_seconds_count 1.0") == 1
    assert 0 < engine.embed_deadline < 5


def test_what_can_be_got_has_a_head() -> None:
    with client() as http:
        for path in ("/health", "/v1/models", "/openapi.json", "/metrics"):
            answer = http.head(path)
            assert (answer.status_code, answer.content) == (200, b""), path


@pytest.mark.parametrize("path", ["/llm/health", "/health"])
def test_a_prefix_may_be_there_or_stripped(path: str) -> None:
    with client(root_path="/llm") as http:
        assert http.get(path).status_code == 200
        answer = http.get("/llm", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/llm/")


def test_the_document_describes_what_there_is(tmp_path: Path) -> None:
    with client() as http:
        document = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/responses", "/v1/models/{model}", "/metrics"} <= document[
        "paths"
    ].keys()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert {"200", "400", "401", "413", "429", "500", "503", "504"} <= chat["responses"].keys()
    references = set(_references(document))
    assert references <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert "422" not in str(document)


def _references(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in _references(item)]
    return [found for item in value for found in _references(item)] if isinstance(value, list) else []


def test_a_page_may_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        "<script>go()</script><style>a{}</style><script src='a.js'></script>"
    )
    (tmp_path / "a.js").write_text("1")
    (tmp_path / "notes.txt").write_text("not served")
    files = page.load(tmp_path)
    assert files.keys() == {"/", "/index.html", "/a.js"}
    policy = files["/"].headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert policy.count("sha256-") == 2


@pytest.mark.skipif(not page.load(), reason="the page is not there")
def test_the_page_is_served_and_may_be_left_out() -> None:
    with client() as http:
        first = http.get("/")
        assert first.status_code == 200 and first.headers["content-type"].startswith("text/html")
        again = http.get("/", headers={"if-none-match": first.headers["etag"]})
        assert again.status_code == 304 and not again.content
    with client(page=False) as http:
        assert http.get("/").status_code == 404
