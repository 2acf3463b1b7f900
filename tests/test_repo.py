"""The repository keeps its word: documents name what exists, locks are whole, the wheel carries the model.

The checks read the files that git knows or would take in (without git: all but hidden ones), so that no
document drifts from the code in silence. A line that says "planned" or "not yet" may name what is still to
come.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "dsv3"
FENCE = re.compile(r"^([ \t]*)(```+|~~~+)[ \t]*(\w*)[^\n]*\n(.*?)^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
PLANNED = re.compile(r"\b(planned|not yet)\b", re.IGNORECASE)
PLACEHOLDER = re.compile(r"\b(TRANSCRIPTS?|SPEED|[A-Z]+(TABLE|LOSS)|TODO|TBD|FIXME|XXX)\b")
MACHINE_PATH = re.compile(r"(?<![\w./:-])/(?:work|home|root|Users)/\w")


@cache
def repo_files() -> tuple[Path, ...]:
    """Every file that belongs to the repository, present on disk."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [
            p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
        ]
    return tuple(sorted(path for path in paths if path.is_file()))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


DOCUMENTS = [path for path in repo_files() if path.suffix == ".md"]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name)


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a document in one language, unindented."""
    return [textwrap.dedent(body) for _, _, lang, body in FENCE.findall(text) if lang == language]


def prose(text: str) -> str:
    """A document without its code, where brackets mean links."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def code(text: str) -> list[str]:
    """Inline code and the lines of shell blocks, but for lines that are marked as planned."""
    shell = [
        line
        for lang in ("sh", "bash", "console")
        for block in blocks(text, lang)
        for line in block.splitlines()
    ]
    lines = [line for line in FENCE.sub("", text).splitlines() if not PLANNED.search(line)]
    inline = [span for line in lines for span in re.findall(r"`([^`]+)`", line)]
    return [line for line in shell if not PLANNED.search(line)] + inline


def commands(text: str, program: str) -> set[str]:
    """The first argument of each call of a program in a document: {"chat"} where it says `dsv3 chat nano`."""
    call = re.compile(rf"(?:^|[|&;$]\s*)(?:\S*/)?{program} ([a-z]+)\b")
    return {command for line in code(text) for command in call.findall(line.strip())}


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+[ \t]+(.+?)[ \t]*$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def pyproject() -> dict[str, dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# ---------------------------------------- documents


@pytest.mark.parametrize(
    "document", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs/fidelity.md"]
)
def test_the_repository_has(document: str) -> None:
    assert (ROOT / document).is_file(), f"{document} is missing"


@each_document
def test_relative_links_resolve(document: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(\s*<?([^)\s>]+)", prose(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        target, _, anchor = link.partition("#")
        path = document.parent / target if target else document
        if not path.exists() or (
            anchor and path.suffix == ".md" and anchor not in anchors(path.read_text(encoding="utf-8"))
        ):
            broken.append(link)
    assert not broken, f"{name(document)} links to what is not there: {broken}"


@each_document
def test_no_document_has_a_gap_left_to_fill(document: Path) -> None:
    lines = document.read_text(encoding="utf-8").splitlines()
    gaps = [f"{name(document)}:{i}: {line}" for i, line in enumerate(lines, 1) if PLACEHOLDER.search(line)]
    assert not gaps, "placeholders:\n" + "\n".join(gaps)


def test_only_what_is_marked_as_planned_may_be_absent() -> None:
    assert code("`a` is planned\n`b` comes later\n`c` is not yet there\n`d` is to come") == ["b", "d"]


def test_the_placeholder_pattern_finds_capitals_alone() -> None:
    gaps = [
        "TRANSCRIPT",
        "TRANSCRIPTS",
        "| Speed | SPEED |",
        "BPBTABLE",
        "| PRELOSS |",
        "SFTLOSS",
        "TODO: it",
        "XXX",
    ]
    words = ["| Speed |", "## Transcripts", "a table of losses", "evaluate DATA RUN OUT"]
    assert [text for text in gaps + words if PLACEHOLDER.search(text)] == gaps


@each_document
def test_python_blocks_compile_and_import_what_exists(document: Path) -> None:
    for block in blocks(document.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block, filename=name(document))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dsv3":
                absent = [a.name for a in node.names if not resolves(f"{node.module}.{a.name}")]
                assert not absent, f"{name(document)}: {node.module} has no {absent}"


def test_every_dsv3_command_in_the_readme_exists() -> None:
    named = commands((ROOT / "README.md").read_text(encoding="utf-8"), "dsv3")
    shown = subprocess.run(
        [sys.executable, "-c", "from dsv3.cli.main import main; main()", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200", "NO_COLOR": "1"},
    )
    assert shown.returncode == 0, f"dsv3 --help failed:\n{shown.stderr}"
    absent = {command for command in named if not re.search(rf"^\W*{command}\b", shown.stdout, re.MULTILINE)}
    assert named, "README.md names no dsv3 command"
    assert not absent, (
        f"README.md names commands that `dsv3 --help` does not: {sorted(absent)}\n{shown.stdout}"
    )


def test_every_make_target_in_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for document in DOCUMENTS:
        named = commands(document.read_text(encoding="utf-8"), "make")
        assert named <= targets, (
            f"{name(document)} names make targets that are not: {sorted(named - targets)}"
        )


def test_changelog_has_a_section_for_what_is_here() -> None:
    version = pyproject()["project"]["version"]
    sections = re.findall(r"^## .*$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert any("unreleased" in section.lower() or version in section for section in sections), (
        f"CHANGELOG.md has a section neither for Unreleased nor for {version}: {sections}"
    )


def test_fidelity_names_modules_and_tests_that_exist() -> None:
    """`model/moe.py`, `tests/model/test_moe.py::test_gate` and `dsv3.model.moe.route` must all be real."""
    tops = {"src", "tests", "benchmarks", "docs", "recipes"}
    parts = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    absent = []
    for span in fidelity_spans():
        for path, symbol in re.findall(r"(?<![\w./])([\w.-]+(?:/[\w.-]+)*\.py)(?:::(\w+))?", span):
            top = path.split("/")[0]
            if top not in tops | parts:
                continue  # somebody else's file
            file = ROOT / path if top in tops else PACKAGE / path
            if not file.is_file() or (symbol and not defines(file, symbol)):
                absent.append(f"{path}::{symbol}" if symbol else path)
        absent += [dotted for dotted in re.findall(r"\bdsv3(?:\.\w+)+", span) if not resolves(dotted)]
    assert not absent, f"docs/fidelity.md names what is not there: {absent}"


def fidelity_spans() -> list[str]:
    """The code spans and link targets of docs/fidelity.md."""
    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    return code(text) + [link.removeprefix("../") for link in re.findall(r"\]\(([^)#\s]+)", text)]


def defines(file: Path, symbol: str) -> bool:
    return bool(
        re.search(rf"^\s*(?:def|class)\s+{symbol}\b|^{symbol}\b", file.read_text(encoding="utf-8"), re.M)
    )


def resolves(dotted: str) -> bool:
    """Whether dsv3.a.b.C leads to a module, or to something that can be read from one."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize(("text", "found"), [("see /wo" + "rk/x", True), ("https://a.org/home/x", False)])
def test_the_machine_path_pattern_finds_paths_and_spares_addresses(text: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) is found


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    found = []
    for path in repo_files():
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        lines = content.decode("utf-8").splitlines()
        found += [
            f"{name(path)}:{i}: {line[:120]}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)
        ]
    assert not found, "absolute paths of one machine:\n" + "\n".join(found)


# ---------------------------------------- locks and wheel


def locked(file: str) -> dict[str, list[str]]:
    """Package -> its pinned versions (more than one where markers part Python versions)."""
    pins: dict[str, list[str]] = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            pin = re.fullmatch(r"==([\w.+!]+)", str(requirement.specifier))
            assert pin and not requirement.url, f"{file}: not an exact version from the index: {line}"
            pins.setdefault(canonicalize_name(requirement.name), []).append(pin[1])
    return pins


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-dev.lock"])
def test_locks_leave_torch_to_the_makefile(file: str) -> None:
    unwelcome = [p for p in locked(file) if p in {"torch", "triton"} or p.startswith(("nvidia", "cuda"))]
    assert not unwelcome, f"{file} holds {unwelcome}: no lock may choose the build of torch"
    assert list(locked("requirements-torch.lock")) == ["torch"]


def test_locks_hold_every_dependency_within_its_range() -> None:
    project = pyproject()["project"]
    runtime = locked("requirements.lock") | locked("requirements-torch.lock")
    dev = locked("requirements-dev.lock") | locked("requirements-torch.lock")
    wanted = [(runtime, line) for line in project["dependencies"]]
    extras = project["optional-dependencies"]
    wanted += [(dev, line) for extra in extras.values() for line in extra if not line.startswith("dsv3[")]
    for pins, line in wanted:
        requirement = Requirement(line)
        versions = pins.get(canonicalize_name(requirement.name), [])
        assert versions, f"{line} is in pyproject.toml but in no lock: run `make lock`"
        assert all(requirement.specifier.contains(v) for v in versions), (
            f"{line} but locked {versions}: `make lock`"
        )
    assert {p: v for p, v in dev.items() if p in runtime} == runtime, (
        "the two locks disagree: run `make lock`"
    )


def test_the_wheel_carries_every_file_of_the_package(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, f"the wheel does not build:\n{built.stderr}"
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    here = {p.relative_to(ROOT / "src").as_posix() for p in repo_files() if p.is_relative_to(PACKAGE)}
    assert not here - packed, f"not in {wheel.name}: {sorted(here - packed)}"
    installed = {path.split("/")[0] for path in packed}
    assert installed == {"dsv3", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
