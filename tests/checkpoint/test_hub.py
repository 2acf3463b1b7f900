"""Names of models, and downloads from a hub that runs in the test: the client is huggingface_hub itself."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import pytest
import torch

import dsv3
from dsv3.checkpoint import resolve
from dsv3.checkpoint.pretrained import locate
from dsv3.checkpoint.reader import QUANTIZATION
from dsv3.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WANTED = {
    "config.json": b'{"model_type": "deepseek_v3"}',
    "model-00001-of-000002.safetensors": b"one",
    "model-00002-of-000002.safetensors": b"two",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"MIT",
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "modeling_deepseek.py": b"import os",
    "original/consolidated.safetensors": b"twice",
    "figures/benchmark.png": b"png",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a snapshot needs, for one public and one gated model."""

    requested: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        files = WANTED | UNWANTED
        if path.startswith("/api/models/org/gated/"):
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/model/revision/"):
            if path.endswith(("/main", "/v1", COMMIT)):
                self.answer(200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": []}).encode())
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/org/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith(f"/org/model/resolve/{COMMIT}/"):
            name = path.split(f"{COMMIT}/")[1]
            self.requested.append(name)
            digest = hashlib.sha1(files[name]).hexdigest()
            self.answer(200, files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        always = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        for name, value in (always | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.requested = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys
import torch
from dsv3.checkpoint import memory, pretrained
from dsv3.checkpoint.hub import resolve
from dsv3.errors import UserError

free = json.loads(sys.argv[1])
if free is not None:
    memory.free_memory = lambda device: free[0]
    pretrained.shutil.disk_usage = lambda folder: type("Usage", (), {"free": free[1]})
for model in sys.argv[2:]:
    try:
        cpu = torch.device("cpu")
        print(resolve(model) if free is None else pretrained.locate(model, None, cpu, packed=free[2]))
    except UserError as error:
        print("refused:", error)
"""


def resolve_at(
    endpoint: str,
    cache: Path,
    *models: str,
    free: tuple[int, int] | None = None,
    packed: bool = False,
    **variables: str,
) -> list[str]:
    """`resolve` in a process of its own: the client reads its settings once, when it is imported.

    free: bytes of memory and disk; given, it is `locate` on a machine with so much. packed: for weights that stay so.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment = inherited | settings | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
    command = [sys.executable, "-c", SCRIPT, json.dumps(free and (*free, packed)), *models]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == len(models), f"not one line for each: {answers}"
    return answers


def test_a_hub_id_downloads_what_a_model_needs_and_then_works_offline(hub: str, tmp_path: Path) -> None:
    (name,) = resolve_at(hub, tmp_path, "org/model")
    assert {file.name: file.read_bytes() for file in Path(name).iterdir()} == WANTED
    assert not set(Hub.requested) & UNWANTED.keys(), "code and pickles must not even be asked for"
    again, unknown = resolve_at(hub, tmp_path, "org/model", "org/other", HF_HUB_OFFLINE="1")
    assert again == name
    assert unknown.startswith("refused: org/other is not a folder here") and "cannot be reached" in unknown


def test_revisions_and_what_the_hub_refuses(hub: str, tmp_path: Path) -> None:
    answers = resolve_at(hub, tmp_path, "org/model@v1", "org/model@v9", "org/gated", "org/nothing")
    assert answers[0].endswith(COMMIT)
    assert answers[1] == "refused: org/model has no revision 'v9' on the hub"
    assert answers[2].startswith(
        "refused: org/gated is gated: accept its terms at https://huggingface.co/org/gated"
    )
    assert answers[3].startswith("refused: org/nothing is neither a folder here nor a model on the hub")


def test_without_a_network_one_line_says_so(tmp_path: Path) -> None:
    (answer,) = resolve_at("http://127.0.0.1:9", tmp_path, "org/model")
    assert answer.startswith("refused: org/model is not a folder here") and "cannot be reached" in answer


# Weights that would not fit ------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
WEIGHTS = {name for name in WANTED if name.endswith(".safetensors")}


@pytest.fixture
def _v3_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's model says that it is DeepSeek-V3, and its index, how much there is to download."""
    monkeypatch.setitem(WANTED, INDEX, b'{"metadata": {"total_size": 688600000000}, "weight_map": {}}')


@pytest.mark.usefixtures("_v3_size")
def test_weights_that_do_not_fit_into_memory_are_not_downloaded(hub: str, tmp_path: Path) -> None:
    (answer,) = resolve_at(hub, tmp_path, "org/model", free=(64 * 10**9, 10**15))
    assert answer == (
        "refused: the model needs 1,342.1 GB as bfloat16, but 64.0 GB are free on cpu: "
        "it takes a machine with more memory"
    )
    assert "config.json" in Hub.requested and not WEIGHTS & set(Hub.requested)


@pytest.mark.usefixtures("_v3_size")
def test_packed_weights_are_as_large_as_the_hub_has_them(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its MTP module, which need not be loaded, left out as if it were in bf16."""
    config = {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1, "quantization_config": QUANTIZATION}
    monkeypatch.setitem(WANTED, "config.json", json.dumps(config).encode())
    (answer,) = resolve_at(hub, tmp_path, "org/model", free=(640 * 10**9, 10**15), packed=True)
    assert answer.startswith(
        "refused: the model, packed as it is, needs 661.7 GB, but 640.0 GB are free on cpu"
    )
    assert not WEIGHTS & set(Hub.requested)
    (folder,) = resolve_at(hub, tmp_path, "org/model", free=(675 * 10**9, 10**15), packed=True)
    assert set(Hub.requested) >= WEIGHTS and folder.endswith(COMMIT)


@pytest.mark.usefixtures("_v3_size")
def test_weights_that_do_not_fit_on_the_disk_are_not_downloaded(hub: str, tmp_path: Path) -> None:
    (answer,) = resolve_at(hub, tmp_path, "org/model", free=(2 * 10**12, 500 * 10**9))
    assert answer.startswith("refused: the download takes 688.6 GB, but 500.0 GB are free where ")
    assert answer.endswith(": free some, or set HF_HOME to a folder on another disk")
    assert not WEIGHTS & set(Hub.requested)
    (folder,) = resolve_at(hub, tmp_path, "org/model", free=(2 * 10**12, 700 * 10**9))
    assert set(Hub.requested) >= WEIGHTS and {file.name for file in Path(folder).iterdir()} == WANTED.keys()


def test_weights_that_are_here_need_no_room_on_the_disk(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WANTED, INDEX, b'{"metadata": {"total_size": 6}}')
    (downloaded,) = resolve_at(hub, tmp_path, "org/model")
    assert resolve_at(hub, tmp_path, "org/model", free=(2 * 10**12, 0)) == [downloaded]


@pytest.mark.parametrize("index", [b"{}", b"[]", b'{"metadata": []}', b'{"metadata": {"total_size": "x"}}'])
def test_an_index_that_says_no_size_stops_no_download(
    hub: str, tmp_path: Path, index: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WANTED, INDEX, index)
    (answer,) = resolve_at(hub, tmp_path, "org/model", free=(2 * 10**12, 0))
    if index == b"[]":  # which is no index
        assert answer.startswith("refused: ") and answer.endswith(
            "holds a list, not an object: download it again"
        )
    else:
        assert answer.endswith(COMMIT) and set(Hub.requested) >= WEIGHTS


def test_another_architecture_is_refused_before_its_weights_are_downloaded(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WANTED, "config.json", b'{"model_type": "llama"}')
    (answer,) = resolve_at(hub, tmp_path, "org/model", free=(2 * 10**12, 10**15))
    assert answer.startswith("refused: model_type is 'llama'")
    assert not WEIGHTS & set(Hub.requested)


# Names that need no hub ----------------------------------------------------------------------------------


@pytest.fixture
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> str:
        raise AssertionError("the hub was asked for a local name")

    monkeypatch.setattr("huggingface_hub.snapshot_download", forbidden)


@pytest.mark.usefixtures("_no_hub")
def test_nano_is_the_model_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("nano") == Path(dsv3.__file__).parent / "assets" / "nano"
    assert resolve("./nano") == Path("nano")


@pytest.mark.usefixtures("_no_hub")
def test_a_local_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("org/model") == Path("org/model")
    assert resolve("~/org/model") == tmp_path / "org" / "model"
    assert resolve(Path("other/model")) == Path("other/model")  # a Path is local, there or not
    for local in ("org/model", "~/org/model", Path("other/model")):
        assert locate(local, None, torch.device("cpu")) == resolve(local)


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize("model", ["./run/last", "/data/model", "~/model", "a/b/c", "deepseek", "../model"])
def test_a_path_that_does_not_exist_says_so(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"does not exist: give a checkpoint's folder, a GGUF file, a hub id .* or nano"
    ):
        resolve(model)


def test_a_download_that_breaks_off_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> str:
        raise ConnectionError("peer closed connection\nwhile reading")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(
        CheckpointError, match=r"^org/model could not .*peer closed connection\): run it again to resume$"
    ):
        resolve("org/model")


def test_names_of_nothing_are_refused() -> None:
    with pytest.raises(CheckpointError, match="name is empty: give"):
        resolve("")
    for model in ("~nobody-of-this-name/model", Path("~nobody-of-this-name/model")):
        with pytest.raises(
            CheckpointError, match=r"^~nobody-of-this-name/model: there is no such home folder"
        ):
            resolve(model)
