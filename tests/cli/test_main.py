"""How commands begin and end: help at once, one line for what a person can mend, and the exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.cli.main import main


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from dsv3.cli.main import main; status = main(['--help']); "
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules]); sys.exit(status)"
    )
    env = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", ["chat", "inspect", "convert"])
def test_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Example: dsv3 {command}" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert command in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dsv3 0")


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["inspct", "tiny"], 2, "inspect"),
        (["inspect"], 2, "MODEL"),
        (["inspect", "tiny", "--bogus"], 2, "--bogus"),
        (["chat", "-p", "hi", "--temperature", "-1"], 2, "--temperature"),
        (["chat", "-p", "hi", "--top-p", "1.5"], 2, "--top-p"),
        (["chat", "-p", "hi", "--max-tokens", "many"], 2, "--max-tokens"),
        (["convert", "a", "b", "--to", "gguf-bf16"], 2, "gguf"),
        (["convert", "a", "b"], 2, "--to"),
        (["inspect", "/no/such/folder"], 1, "/no/such/folder"),
        (["inspect", "no-such-preset"], 1, "no-such-preset"),
        (["inspect", ""], 1, "name is empty"),
        (["inspect", "~nobody-of-this-name/model"], 1, "no such home folder"),
        (["inspect", "x" * 300], 1, "x" * 300),
        (["convert", "nano", "/dev/null/x", "--to", "bf16"], 1, "/dev/null/x"),
        (["chat", "/no/such/folder", "-p", "hi"], 1, "/no/such/folder"),
        (["chat", "-p", " "], 1, "prompt is empty"),
        (["convert", "/no/such/folder", "out", "--to", "bf16"], 1, "/no/such/folder"),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    args: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dsv3: ") and err.count("\n") == 1 and says in err


def test_an_interrupted_command_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsv3.checkpoint.summary.summarize", interrupted)
    assert main(["inspect", "tiny"]) == 130


def test_what_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(model: str) -> None:
        Path(model).read_text()

    monkeypatch.setattr("dsv3.checkpoint.summary.summarize", refused)
    assert main(["inspect", "/no/such/file"]) == 1
    assert capsys.readouterr().err == "dsv3: /no/such/file: No such file or directory\n"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which `$dsv3` is the command."""
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "PYTHONUNBUFFERED": "",  # as everybody has it: what is printed may fail as late as at the end
        "dsv3": f"{sys.executable} -m dsv3.cli.main",
    }
    return subprocess.run(["sh", "-c", line], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("line", "status", "err"),
    [
        ("$dsv3 chat <&-", 1, "dsv3: standard input is empty"),
        ("$dsv3 --help >&-", 0, ""),
        ("$dsv3 chat -p ' ' 2>&-", 1, ""),
        ("$dsv3 --version | true", 0, ""),
        pytest.param(
            "$dsv3 --version >/dev/full",
            1,
            "dsv3: No space left on device",
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full"),
        ),
    ],
)
def test_streams_that_are_closed_or_full(line: str, status: int, err: str) -> None:
    done = shell(line)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(err) and done.stderr.count("\n") == bool(err), done.stderr


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.checkpoint.summary.summarize", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "tiny"])


def test_a_terminal_without_the_letters_shows_what_it_can(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "dsv3.cli.main", "inspect", str(tmp_path / "狐狸")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "/??" in done.stderr and "Traceback" not in done.stderr
