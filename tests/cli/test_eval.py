"""`dsv3 eval`: what it prints, draws and refuses. tests/eval checks the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3.cli.main import main

ASK = ["--tasks", "needle", "--lengths", "400,512", "--depths", "3", "--samples", "2", "--raw"]


def test_a_table_and_a_picture(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "80")
    picture = tmp_path / "needle.png"
    assert main(["eval", str(checkpoint), *ASK, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    lines = out.splitlines()
    assert any(line.split() == ["depth", "400", "512"] for line in lines), out
    assert [line.split()[0] for line in lines if " / " in line] == ["0%", "50%", "100%"], out
    assert "chance 10%, of 10" in out and "plain text, 2 texts per cell" in out
    assert max(map(len, lines)) <= 80


def test_json(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = tmp_path / "book.txt"
    book.write_text("It rained. Then it did not. " * 20)
    assert main(["eval", str(checkpoint), *ASK, "--haystack", str(book), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    needle = facts["tasks"]["needle"]
    assert facts["model"] == str(checkpoint) and needle["haystack"] == str(book)
    assert needle["lengths"] == [400, 512] and needle["depths"] == [0, 0.5, 1] and len(needle["cells"]) == 6
    assert needle["chance"]["first"] == 0.1 and needle["format"] == "raw"


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["--tasks", "needel"], 2, "'needel' is none of the tasks: needle"),
        (["--tasks", "needle,"], 2, "'' is none of the tasks: needle"),
        ([], 2, "--tasks"),
        (["--tasks", "needle", "--lengths", "many"], 2, "--lengths"),
        (["--tasks", "needle", "--lengths", "0"], 2, "--lengths"),
        (["--tasks", "needle", "--samples", "0"], 2, "--samples"),
        (["--tasks", "needle", "--lengths", "4096"], 1, "4096 is too long: the model takes 512"),
        (["--tasks", "needle", "--plot", "needle.jpg"], 1, ".png"),
        (["--tasks", "needle", "--haystack", "none.txt"], 1, "none.txt"),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    args: list[str], status: int, says: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(checkpoint), *args]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dsv3: ") and err.count("\n") == 1 and says in err, err


def test_it_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    assert "Example: dsv3 eval nano --tasks needle" in " ".join(capsys.readouterr().out.split())
