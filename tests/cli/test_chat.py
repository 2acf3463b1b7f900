"""`dsv3 chat`: a filter where there is no terminal, a session where there is one."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsv3 import LLM, SamplingParams
from dsv3.cli.chat import Answer, Session, load_messages, save_messages
from dsv3.cli.main import main
from dsv3.engine.llm import CompletionOutput, RequestOutput
from dsv3.engine.machine import suggested_threads
from dsv3.errors import UserError
from tests.cli.terminal import Terminal

QUICK = ["--max-tokens", "12"]


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), dtype="float32")


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.BytesIO]:
    """Standard input that is a pipe; write what is in it."""
    pipe = io.BytesIO()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(pipe))
    yield pipe


def put(pipe: io.BytesIO, content: bytes) -> None:
    pipe.write(content)
    pipe.seek(0)


# The filter -------------------------------------------------------------------------------------------------


def test_a_prompt_on_stdin_prints_the_reply_and_nothing_else(
    llm: LLM, checkpoint: Path, stdin: io.BytesIO, capsys: pytest.CaptureFixture[str]
) -> None:
    put(stdin, b"Tell me about a fox.\n")
    assert main(["chat", str(checkpoint), "--dtype", "float32", *QUICK]) == 0
    out, err = capsys.readouterr()
    params = SamplingParams(max_tokens=12, temperature=0.0)  # generation_config.json says greedy
    reply = llm.chat([{"role": "user", "content": "Tell me about a fox."}], params)[0].text
    assert (out, err) == (reply.removesuffix("\n") + "\n", "")


@pytest.mark.parametrize(("flags", "threads"), [([], 1), (["--threads", "2"], 2)])
def test_a_small_model_runs_on_one_thread_unless_told_otherwise(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], threads: int
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    chosen: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    assert main(["chat", str(checkpoint), "-p", "fox", *QUICK, *flags]) == 0
    assert chosen == [threads]


def test_a_large_model_gets_every_thread(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    assert suggested_threads(llm.model) == 1
    monkeypatch.setattr("dsv3.engine.machine.SMALL", 1000)
    assert suggested_threads(llm.model) == 7


def test_flags_override_the_checkpoints_own(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(*flags: str) -> str:
        assert main(["chat", str(checkpoint), "-p", "fox", *QUICK, *flags]) == 0
        return capsys.readouterr().out

    greedy, free = reply(), reply("--temperature", "5", "--seed", "1")
    assert free != greedy, "generation_config.json says greedy"
    assert reply("--temperature", "5", "--seed", "1") == free
    assert reply("--temperature", "5", "--seed", "2") != free
    assert reply("--temperature", "5", "--top-k", "1") == greedy
    assert reply("--system", "You are a hen.") != greedy
    assert reply("--presence-penalty", "2") != greedy
    assert reply("--frequency-penalty", "2") != greedy
    stops = [greedy[4:7], greedy[2:4]]
    ends = min(greedy.index(stop) for stop in stops)
    assert reply("--stop", stops[0], "--stop", stops[1]) == greedy[:ends] + "\n"


def test_thinking_is_the_templates(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def prompt_tokens(model: Path, *flags: str) -> int:
        assert main(["chat", str(model), "-p", "fox", "--json", *QUICK, *flags]) == 0
        tokens: int = json.loads(capsys.readouterr().out)["prompt_tokens"]
        return tokens

    thinker = shutil.copytree(checkpoint, tmp_path / "thinker")
    (thinker / "chat_template.jinja").write_text("fox{{ '<think>' if thinking else '</think> </think>' }}")
    yes, no = prompt_tokens(thinker, "--thinking"), prompt_tokens(thinker, "--no-thinking")
    assert (yes, prompt_tokens(thinker)) == (no - 2, no)
    assert main(["chat", str(checkpoint), "-p", "fox", "--thinking"]) == 1
    assert "--thinking changes nothing" in capsys.readouterr().err


def test_json_for_programs(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(checkpoint), "-p", "fox", "--json", *QUICK]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.keys() == {"text", "prompt_tokens", "tokens", "finish_reason", "tokens_per_second"}
    assert facts["finish_reason"] in ("stop", "length") and 0 < facts["tokens"] <= 12


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--top-p", "0"),
        ("--top-p", "1.1"),
        ("--repetition-penalty", "0"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--stop", ""),
    ],
)
def test_wrong_sampling_is_said_before_a_model_is_looked_for(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "/no/such/model", "-p", "fox", flag, value]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"dsv3: Invalid value for '{flag}': ") and err.count("\n") == 1, err


def test_top_k_may_be_any_number(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replies = []
    for k in ("0", "1" + 20 * "0"):
        free = ["--temperature", "5", "--seed", "1", "--top-k", k]
        assert main(["chat", str(checkpoint), "-p", "fox", *QUICK, *free]) == 0
        replies.append(capsys.readouterr())
    assert replies[0] == replies[1]


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_stdin_is_said_before_a_model_is_looked_for(
    content: bytes, stdin: io.BytesIO, capsys: pytest.CaptureFixture[str]
) -> None:
    put(stdin, content)
    assert main(["chat", "/no/such/model"]) == 1
    assert capsys.readouterr().err == (
        "dsv3: standard input is empty: pipe a prompt in, or give one with -p\n"
    )


def test_a_prompt_beyond_the_context_is_one_line(
    checkpoint: Path, stdin: io.BytesIO, capsys: pytest.CaptureFixture[str]
) -> None:
    put(stdin, b"fox " * 2000)
    assert main(["chat", str(checkpoint), *QUICK]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dsv3: the prompt has ") and err.count("\n") == 1
    assert "shorten it to 511 at most" in err


def test_an_interruption_while_the_model_is_loaded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsv3.engine.llm.DeepseekV3.from_pretrained", interrupted)
    assert main(["chat", str(checkpoint), "-p", "fox"]) == 130


def test_a_standard_input_that_is_closed() -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = f"exec {shlex.quote(sys.executable)} -m dsv3.cli.main chat /no/such/model <&-"
    done = subprocess.run(command, shell=True, capture_output=True, env=env, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "dsv3: standard input is empty: pipe a prompt in, or give one with -p\n"


def test_a_reader_that_leaves_early_is_no_error(checkpoint: Path) -> None:
    """The pipe is closed before the reply begins, as by `| head -c0`. The status is that of a SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-m", "dsv3.cli.main", "chat", str(checkpoint), "-p", "fox", *QUICK]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=env, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


# The conversation -------------------------------------------------------------------------------------------


@dataclass
class Scripted:
    """Stands in for an LLM: answers word by word, and is interrupted after some of them."""

    words: list[str]
    interrupt_after: int | None = None
    max_model_len: int = 100
    seen: Any = None
    variables: Any = None

    class tokenizer:
        @staticmethod
        def encode_chat(messages: list[Any], **variables: Any) -> list[int]:
            return [0] * sum(len(message["content"]) for message in messages)

    def stream_chat(
        self, messages: list[Any], params: SamplingParams, chat_template_kwargs: Any
    ) -> Iterator[RequestOutput]:
        self.seen, self.variables = messages, chat_template_kwargs
        for i, word in enumerate(self.words):
            if i == self.interrupt_after:
                raise KeyboardInterrupt
            reason = "stop" if i == len(self.words) - 1 else None
            yield RequestOutput(
                None, [1, 2], [CompletionOutput(0, "", list(range(i + 1)), reason)], delta=word
            )  # type: ignore[arg-type]


def session(llm: Any, **kwargs: Any) -> Session:
    return Session(llm, SamplingParams(max_tokens=10), **kwargs)


def test_the_conversation_remembers_both_sides() -> None:
    llm = Scripted(["A ", "fox."])
    talk = session(llm, system="Be brief.")
    talk.reply("Who?")
    talk.reply("And?")
    assert [m["content"] for m in llm.seen] == ["Be brief.", "Who?", "A fox.", "And?"]
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_what_the_template_takes_goes_with_every_question() -> None:
    llm = Scripted(["A fox."])
    session(llm, variables={"thinking": True}).reply("Who?")
    assert llm.variables == {"thinking": True}


def test_an_interrupted_answer_is_kept_as_far_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    talk = session(Scripted(["A ", "fox ", "that"], interrupt_after=2))
    talk.reply("Who?")
    assert [m["content"] for m in talk.messages] == ["Who?", "A fox "]
    assert "stopped by you" in capsys.readouterr().err
    talk.reply("Go on.")
    assert len(talk.messages) == 4


def test_a_question_without_an_answer_is_forgotten() -> None:
    talk = session(Scripted(["A"], interrupt_after=0))
    talk.reply("Who?")
    assert talk.messages == []


def test_a_question_that_cannot_be_asked_is_forgotten(llm: LLM) -> None:
    talk = session(llm)
    with pytest.raises(UserError, match="max_model_len"):
        talk.reply("fox " * 600)
    assert talk.messages == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_whatever_stops_a_question_it_is_forgotten(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    talk = session(Scripted(["A fox."]))
    talk.reply("Who?")
    monkeypatch.setattr(Scripted.tokenizer, "encode_chat", fails)
    with pytest.raises(error):
        talk.reply("And?")
    assert [m["content"] for m in talk.messages] == ["Who?", "A fox."]


def test_an_interruption_before_the_answer_does_not_end_the_session(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long conversation takes a while to be cut to the context, and Ctrl-C may come then too."""
    lines = iter(["Who?", "interrupted", "And?"])

    class Editor:
        def prompt(self, _: str) -> str:
            if (line := next(lines, None)) is None:
                raise EOFError
            return line

    def encode_chat(messages: list[Any], **_: Any) -> list[int]:
        if messages[-1]["content"] == "interrupted":
            raise KeyboardInterrupt
        return [0]

    monkeypatch.setattr("dsv3.cli.chat._line_editor", Editor)
    monkeypatch.setattr(Scripted.tokenizer, "encode_chat", encode_chat)
    talk = session(Scripted(["A fox."]))
    talk.run("title")
    assert [m["content"] for m in talk.messages] == ["Who?", "A fox.", "And?", "A fox."]
    assert "Ctrl-D or /exit leaves" in capsys.readouterr().err


def test_the_oldest_turns_go_when_the_context_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    llm = Scripted(["x" * 20])
    talk = session(llm, system="S")
    for question in ("a" * 20, "b" * 20, "c" * 20):
        talk.reply(question)
    # 1 + 20 + 20 + 20 + 20 + 20 is over the 90 that leave room for an answer of 10.
    assert [m["content"][0] for m in llm.seen] == ["S", "b", "x", "c"]
    assert capsys.readouterr().err.count("no longer sees the oldest 2 messages") == 1
    assert len(talk.messages) == 7, "what is saved is everything"


def test_tokens_per_second_leaves_out_the_prompts_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 11.0])  # when each of three tokens comes
    monkeypatch.setattr("dsv3.cli.chat.perf_counter", lambda: next(clock))
    answer = session(Scripted(["a", "b", "c"])).ask([], lambda text: None)
    assert answer == Answer("abc", 2, 3, "stop", tokens_per_second=2.0)


def test_commands(tmp_path: Path) -> None:
    talk = session(Scripted(["A fox."]))
    talk.command("/system You are a fox.")
    talk.reply("Who?")
    file = tmp_path / "talk.json"
    assert talk.command(f"/save {file}")
    saved = json.loads(file.read_text())
    assert saved == talk.messages and len(saved) == 3
    assert list(tmp_path.iterdir()) == [file], "no temporary file stays"
    talk.command("/reset")
    assert [m["role"] for m in talk.messages] == ["system"]
    talk.command("/system")
    assert talk.messages == []
    talk.command(f"/load {file}")
    assert talk.messages == saved
    assert talk.command("/help") and not talk.command("/exit")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/save", "needs the name of a file"),
        ("/save /no/such/folder/x.json", "cannot write /no/such/folder/x.json: No such file"),
        ("/load /no/such.json", "cannot read /no/such.json: No such file"),
        ("/sav x", "no command /sav"),
        ("/save .", "'.' names no file"),
        ("/save /", "'/' names no file"),
        ("/save ~", "cannot write"),
        ("/save ..", "cannot write"),
        ("/save ~nouser/x", "~nouser/x names no file"),
        ("/load ~nouser/x", "~nouser/x names no file"),
        ("/load .", "'.' names no file"),
        ("/save a\0b", r"'a\\x00b' names no file"),
        ("/load a\0b", r"'a\\x00b' names no file"),
    ],
)
def test_commands_that_cannot_be_done_say_why(line: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        session(Scripted(["A"])).command(line)
    assert not list(Path().glob(".*.partial"))


def test_a_file_that_is_no_conversation_is_refused(tmp_path: Path) -> None:
    for content in ("{", '{"role": "user"}', '[{"role": "robot", "content": "x"}]', "[" * 100_000):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError):
            load_messages(tmp_path / "x.json")


def test_what_is_nested_too_deeply_to_be_saved_is_no_crash(tmp_path: Path) -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(UserError, match="cannot write"):
        save_messages(tmp_path / "x.json", [{"role": "user", "content": "x", "more": nested}])  # type: ignore[typeddict-unknown-key]
    assert list(tmp_path.iterdir()) == []


def test_saving_leaves_the_old_file_whole_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talk.json"
    save_messages(file, [{"role": "user", "content": "从前"}])
    before = file.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left"):
        save_messages(file, [])
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]


# The terminal -----------------------------------------------------------------------------------------------

ENDLESS = """
import sys, time
from dsv3.cli.main import main
from dsv3 import LLM
from dsv3.engine.llm import CompletionOutput, RequestOutput
from dsv3.engine.machine import suggested_threads

answer = LLM.stream_chat

def stream_chat(self, messages, params, **variables):
    if messages[-1]["content"] != "endless":
        yield from answer(self, messages, params, **variables)
        return
    words = 0
    while True:
        yield RequestOutput(None, [1], [CompletionOutput(0, "", [1] * (words + 1), None)], delta=f"w{words} ")
        words += 1
        time.sleep(0.005)

LLM.stream_chat = stream_chat
sys.exit(main(["chat", *sys.argv[1:]]))
"""


def test_a_session_at_a_terminal(checkpoint: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of an answer keeps what was said and goes on; Ctrl-D leaves."""
    state, saved = tmp_path / "state", tmp_path / "talk.json"
    env = {"XDG_STATE_HOME": str(state)}
    with Terminal(ENDLESS, str(checkpoint), "--max-tokens", "5", env=env) as terminal:
        terminal.wait_for("Ctrl-D leaves")
        terminal.wait_for(">")
        terminal.press("endless\r")
        terminal.wait_for("w3 ")
        terminal.press("\x03")
        terminal.wait_for("stopped by you")
        terminal.wait_for(">")
        terminal.press("half a line\x03")  # at the prompt it only clears the line
        terminal.wait_for("Ctrl-D or /exit leaves")
        terminal.wait_for(">")
        terminal.press(f"/save {saved}\r")
        terminal.wait_for("saved 2 messages")
        terminal.wait_for(">")
        terminal.press("/bogus\r")
        terminal.wait_for("no command /bogus")
        terminal.wait_for(">")
        terminal.press("one\x1b\rtwo\r")  # Alt-Enter: two lines, one message
        terminal.wait_for("tokens/s")
        terminal.wait_for(">")
        terminal.press("\x1b[A")  # the arrow brings it back
        terminal.wait_for("two")
        terminal.press("\x03")
        terminal.wait_for("Ctrl-D or /exit leaves")
        terminal.wait_for(">")
        terminal.press("\x04")
        assert terminal.wait_for_exit() == 0
    question, answer = json.loads(saved.read_text())
    assert question == {"role": "user", "content": "endless"}
    assert answer["content"].startswith("w0 w1 w2 w3 ")
    history = (state / "dsv3" / "history").read_text()
    assert "+endless" in history and "+one\n+two" in history


def test_a_session_without_a_place_for_its_history(checkpoint: Path) -> None:
    with Terminal(
        ENDLESS, str(checkpoint), "--max-tokens", "5", env={"XDG_STATE_HOME": "/dev/null"}
    ) as terminal:
        terminal.wait_for(">")
        terminal.press("hi\r")
        terminal.wait_for("tokens/s")
        terminal.wait_for(">")
        terminal.press("/exit\r")
        assert terminal.wait_for_exit() == 0
