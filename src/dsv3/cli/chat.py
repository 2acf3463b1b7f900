"""`dsv3 chat`: talk with a model in the terminal, or ask it once from a pipe.

With a person at the terminal it is a session: answers stream, Ctrl-C stops one and keeps what was said,
commands begin with `/`. With a prompt (`-p`, or anything on standard input) it is a filter: the reply goes to
standard output and nothing else does. Notes, speeds and errors go to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dsv3.errors import UserError

if TYPE_CHECKING:  # these import torch, which --help does not wait for
    from prompt_toolkit import PromptSession

    from dsv3.engine.llm import LLM
    from dsv3.engine.sampling import SamplingParams
    from dsv3.text import Message

HELP = """\
/system TEXT  set the text before the conversation; without TEXT remove it
/reset        forget the conversation, keep the system text
/save FILE    write the conversation to FILE as JSON
/load FILE    go on with a conversation from such a file
/help         this list
/exit         leave (so does Ctrl-D)
Ctrl-C stops an answer, Alt-Enter begins a new line, the up arrow brings back
what you wrote before."""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]

# A model may write any byte, escape sequences too; a terminal gets text, line breaks and tabs.
_CONTROLS = dict.fromkeys(c for c in [*range(0x20), *range(0x7F, 0xA0)] if chr(c) not in "\n\t")


def _sampling(help: str, **bounds: Any) -> Any:
    """An option that overrides one of the checkpoint's own; None leaves it as it is."""
    return typer.Option(help=help, rich_help_panel="Sampling (default: the checkpoint's own)", **bounds)


def chat(
    model: Annotated[
        str, typer.Argument(help="nano, a checkpoint's folder, a GGUF file, or a hub id.", metavar="MODEL")
    ] = "nano",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and leave, as with a prompt piped in.")
    ] = None,
    system: Annotated[str, typer.Option("--system", "-s", help="Text before the conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    temperature: Annotated[float | None, _sampling("Above 1 freer; 0 is greedy.", min=0)] = None,
    top_p: Annotated[
        float | None, _sampling("Keep this much of the probability: above 0, at most 1.")
    ] = None,
    top_k: Annotated[int | None, _sampling("Keep the k likeliest; 0 keeps all.", min=0)] = None,
    min_p: Annotated[
        float | None, _sampling("Keep the likeliest, and what is this likely beside it.", min=0, max=1)
    ] = None,
    repetition_penalty: Annotated[
        float | None, _sampling("Above 1 repeats less; it must be above 0.")
    ] = None,
    presence_penalty: Annotated[
        float | None, _sampling("Above 0 avoids what it has said.", min=-2, max=2)
    ] = None,
    frequency_penalty: Annotated[
        float | None, _sampling("The same, once for each time.", min=-2, max=2)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; give it again for more.")
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Reason first or not, where the chat format has both."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the answers repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: one for a small model, else all cores.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Keep to so much, such as 12GB: experts are read from disk when they are needed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With a prompt: the reply as JSON.")] = False,
) -> None:
    """Chat with a model; without a terminal, answer what is on standard input."""
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
        if not prompt.strip():
            raise UserError("standard input is empty: pipe a prompt in, or give one with -p")
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty: write something after -p")
    if as_json and prompt is None:
        raise typer.BadParameter("it needs a prompt: give -p, or pipe one in", param_hint="--json")

    wanted: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "stop": stop,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    _check_flags(given)

    from dsv3.engine.llm import LLM

    seed = secrets.randbits(32) if seed is None else seed
    llm = LLM(model, dtype=dtype, device=device, memory=memory, seed=seed, progress=sys.stderr.isatty())
    llm.use_threads(threads)
    if thinking is not None and "thinking" not in (llm.tokenizer.chat_template or ""):
        raise UserError(
            f"--thinking changes nothing: the chat template of {model} does not know it, leave it out"
        )
    variables = {} if thinking is None else {"thinking": thinking}
    session = Session(llm, dataclasses.replace(llm.default_params, **given), system, variables)
    if prompt is None:
        session.run(f"{model} · {llm.max_model_len:,} tokens of context")
    else:
        session.reply_once(prompt.strip(), as_json)


def _check_flags(given: dict[str, Any]) -> None:
    """Refuse what SamplingParams would, as wrong use and before a model is loaded."""
    from dsv3.engine.sampling import SamplingParams

    for name, value in given.items():
        try:
            SamplingParams(**{name: value})
        except UserError as error:
            raise typer.BadParameter(str(error), param_hint=f"'--{name.replace('_', '-')}'") from None


@dataclasses.dataclass
class Answer:
    """What the model said to one message, and how fast."""

    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    finish_reason: str | None = None
    """None: interrupted."""
    tokens_per_second: float = 0.0
    """After the first piece of text, whose time is the prompt's."""


class Session:
    """A conversation at the terminal: what was said so far, and what the next line does to it."""

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str = "", variables: dict[str, Any] | None = None
    ) -> None:
        """variables: what the chat template is given besides the messages."""
        self.llm, self.params, self.system = llm, params, system
        self.variables = variables or {}
        self.turns: list[Message] = []
        self.dropped = 0
        self.experts = getattr(llm, "experts", None)
        self.notes = Console(stderr=True, highlight=False, markup=False)

    @property
    def messages(self) -> list[Message]:
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns

    # Answers -------------------------------------------------------------------------------------------

    def ask(self, messages: list[Message], write: Callable[[str], object]) -> Answer:
        """Stream the answer to `write`. An interruption ends it, and what there is of it is returned."""
        answer, first = Answer(), (0, 0.0)
        if self.experts is not None:
            self.experts.reads = type(self.experts.reads)()  # from here on, for this answer
        try:
            stream = self.llm.stream_chat(messages, self.params, chat_template_kwargs=self.variables)
            with closing(stream) as outputs:
                for output in outputs:
                    answer.text += output.delta  # first: what was shown must be kept
                    write(output.delta)
                    now = (len(output.token_ids), perf_counter())
                    if not answer.tokens:
                        first = now
                    elif now[1] > first[1]:
                        answer.tokens_per_second = (now[0] - first[0]) / (now[1] - first[1])
                    answer.prompt_tokens, answer.tokens = len(output.prompt_token_ids), now[0]
                    answer.finish_reason = output.finish_reason
        except KeyboardInterrupt:
            answer.finish_reason = None
        return answer

    def reply_once(self, prompt: str, as_json: bool = False) -> None:
        """Answer one prompt on standard output. An interruption is the caller's to report."""
        self.turns.append({"role": "user", "content": prompt})
        answer = self.ask(self.messages, (lambda text: None) if as_json else _write)
        if answer.finish_reason is None:
            raise KeyboardInterrupt
        if as_json:
            print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False))
        elif not answer.text.endswith("\n"):
            _write("\n")
        if sys.stdout.isatty():
            self._note_speed(answer)

    def reply(self, text: str) -> None:
        """Answer one message of the conversation, which remembers both, or neither if there is no answer."""
        question: Message = {"role": "user", "content": text}
        answer = self.ask(self._within_context(question), _write)
        if answer.text:
            self.turns += [question, {"role": "assistant", "content": answer.text}]
        _write("\n")
        self._note_speed(answer)

    def _within_context(self, question: Message) -> list[Message]:
        """The conversation up to the question, without its oldest turns if they leave no room for an answer.

        Says so once.
        """
        from dsv3.text.chat import latest_turns

        context = self.llm.max_model_len
        room = context - min(self.params.max_tokens or context, context // 4)
        encode = self.llm.tokenizer.encode_chat
        messages = [*self.messages, question]
        kept = latest_turns(messages, lambda m: len(encode(m, **self.variables)) <= room)
        dropped = len(messages) - len(kept)
        if dropped > self.dropped:
            self._note(f"the context is full: the model no longer sees the oldest {dropped} messages")
        self.dropped = dropped
        return kept

    def _note_speed(self, answer: Answer) -> None:
        ends = {None: ", stopped by you", "length": ", cut off at the limit"}
        speed = f"{answer.tokens} tokens, {answer.tokens_per_second:.0f} tokens/s"
        self._note(speed + ends.get(answer.finish_reason, ""))
        if self.experts is not None:
            self._note(str(self.experts.reads))

    def _note(self, text: str) -> None:
        self.notes.print(text, style="dim")

    # The session ---------------------------------------------------------------------------------------

    def run(self, title: str) -> None:
        """Read lines until the person leaves. Ctrl-C ends what is being done, never the conversation."""
        editor = _line_editor()
        self._note(f"{title} · /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = editor.prompt("> ")
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line.strip():
                    self.reply(line.strip())
                    self._note("")
            except KeyboardInterrupt:
                self._note("Ctrl-D or /exit leaves")
            except EOFError:
                return
            except UserError as error:
                self.notes.print(str(error), style="red")

    def command(self, line: str) -> bool:
        """Do what a line that begins with `/` says; returns whether the session goes on."""
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name in ("/save", "/load") and not argument:
            raise UserError(f"{name} needs the name of a file")
        match name:
            case "/exit" | "/quit":
                return False
            case "/help":
                self._note(HELP)
            case "/reset":
                self.turns, self.dropped = [], 0
                self._note("the conversation is forgotten")
            case "/system":
                self.system = argument
                self._note("the system text is set" if argument else "there is no system text now")
            case "/save":
                save_messages(Path(argument), self.messages)
                self._note(f"saved {len(self.messages)} messages to {argument}")
            case "/load":
                messages = load_messages(Path(argument))
                self.system = "\n\n".join(m["content"] or "" for m in messages if m["role"] == "system")
                self.turns, self.dropped = [m for m in messages if m["role"] != "system"], 0
                self._note(f"loaded {len(messages)} messages from {argument}")
            case _:
                raise UserError(f"no command {name}: /help lists them; a message may begin with a space")
        return True


def save_messages(path: Path, messages: list[Message]) -> None:
    """Write a conversation as JSON. The file is there whole or not at all."""
    path = _file(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
        new.write_text(text, encoding="utf-8", errors="replace")
        os.replace(new, path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    except RecursionError as error:  # what was loaded may be nested too deeply to be written
        raise UserError(f"cannot write {path}: {error}") from None


def load_messages(path: Path) -> list[Message]:
    """Read a conversation that `save_messages` wrote."""
    from dsv3.text.chat import check_messages

    path = _file(path)
    try:
        messages: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a saved conversation: {error}") from None
    check_messages(messages)
    return list(messages)


def _file(path: Path) -> Path:
    """The path with `~` written out; raises UserError where it cannot be a file's."""
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} names no file: {error}") from None
    if not path.name or "\0" in str(path):
        raise UserError(f"{str(path)!r} names no file: give one such as talk.json")
    return path


def _write(text: str) -> None:
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _line_editor() -> PromptSession[str]:
    """A line with editing, history over sessions, and Alt-Enter for more lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=_history(),
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        completer=WordCompleter(COMMANDS, sentence=True),
        complete_while_typing=False,
        output=create_output(stdout=sys.stderr if not sys.stdout.isatty() else None),
    )


def _history() -> Any:
    """What was typed before, in the user's state folder; in memory alone where that cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class QuietHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError, UnicodeError):  # neither a full disk nor an odd byte ends a conversation
                super().store_string(string)

    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        path = Path(state) / "dsv3" / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return InMemoryHistory()
    return QuietHistory(str(path))
