"""`dsv3 serve` and `dsv3 keys`: what they say when something is wrong, and what a flag becomes."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from dsv3.cli.main import main

Captured = pytest.CaptureFixture[str]


def fails(capsys: Captured, *args: str) -> str:
    """The one line that a command ends with, whose exit status is not 0."""
    assert main(args) in (1, 2)
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    assert line.startswith("dsv3: ")
    return line


def test_a_port_in_use_is_said_before_a_model_is_read(capsys: Captured) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = fails(capsys, "serve", "no-such-model", "--port", str(port))
    assert f"port {port} of 127.0.0.1 cannot be had" in line and "--port" in line


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--port", "99999"], "--port"),
        (["--tls-cert", "cert.pem"], "tls_key is missing"),
        (["--tls-cert", "no.pem", "--tls-key", "no.pem"], "no.pem is missing"),
        (["--cors-origin", "*"], "cors_origins"),
        (["--root-path", "llm"], "root_path"),
        (["--api-keys", "no.json"], "dsv3 keys add NAME --file no.json"),
        (["--host", "no such host"], "no such host"),
        (["--max-body", "5"], "--max-body"),
    ],
)
def test_a_wrong_setting_is_one_line(capsys: Captured, args: list[str], named: str) -> None:
    assert named in fails(capsys, "serve", "no-such-model", *args)


def test_an_unknown_model_ends_the_server_with_one_line(capsys: Captured, tmp_path: Path) -> None:
    line = fails(capsys, "serve", str(tmp_path / "none"), "--port", "0")
    assert "none" in line


def test_flags_become_settings_and_the_engines_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def run(app: Any, settings: Any, taken: socket.socket, on_ready: Any) -> None:
        seen["settings"] = settings
        taken.close()
        with pytest.raises(_Stop):
            app.state.service._source()

    class Recorded:
        def __init__(self, model: str, **arguments: Any) -> None:
            seen.update(model=model, arguments=arguments)
            raise _Stop

    monkeypatch.setattr("dsv3.server.run.serve", run)
    monkeypatch.setattr("dsv3.engine.llm.LLM", Recorded)
    flags = (
        "--port 0 --served-model-name a --served-model-name b --max-num-seqs 5 --speculation 2 --deterministic "
        "--no-prefix-caching --cache-tokens 4096 --rate-limit 60 --max-concurrent 3 --no-page --no-access-log "
        "--log-prompts --drain 7 --request-timeout 9 --keep-alive 3 --cors-origin https://a.example.org --allowed-host b.example.org"
    )
    assert main(["serve", str(tmp_path), *flags.split()]) == 0
    settings, arguments = seen["settings"], seen["arguments"]
    assert settings.served_model_names == ("a", "b")
    assert (settings.rate_limit, settings.max_concurrent, settings.drain) == (60, 3, 7)
    assert (settings.request_timeout, settings.keep_alive) == (9, 3)
    assert (settings.page, settings.access_log, settings.log_prompts) == (False, False, True)
    assert settings.cors_origins == ("https://a.example.org",) and settings.allowed_hosts == (
        "b.example.org",
    )
    assert seen["model"] == str(tmp_path)
    assert arguments.items() >= {"max_num_seqs": 5, "speculation": 2, "deterministic": True}.items()
    assert arguments["prefix_caching"] is False and arguments["cache_tokens"] == 4096
    assert main(["serve", str(tmp_path), "--port", "0"]) == 0
    assert seen["settings"].served_model_names == (tmp_path.name,)


class _Stop(Exception):
    pass


def test_keys_are_added_listed_and_removed(capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    assert main(["keys", "add", "ada", "--file", str(file)]) == 0
    out, err = capsys.readouterr()
    (key,) = out.splitlines()
    assert key.startswith("sk-dsv3-") and key not in err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert main(["keys", "list", "--file", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "ada" in shown and key not in shown
    assert "'ada' has a key" in fails(capsys, "keys", "add", "ada", "--file", str(file))
    assert main(["keys", "remove", "ada", "--file", str(file)]) == 0
    assert "ada" not in file.read_text()
    assert "'eve' has no key" in fails(capsys, "keys", "remove", "eve", "--file", str(file))
