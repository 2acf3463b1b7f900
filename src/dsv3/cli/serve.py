"""`dsv3 serve`: a model behind OpenAI's API, and a page to chat on."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv3.cli.units import number_or_word

if TYPE_CHECKING:  # these import torch, which --help does not wait for
    from dsv3.engine.async_engine import AsyncEngine
    from dsv3.server.settings import Settings

_ENGINE, _LIMITS, _ACCESS, _LOGS = "Engine", "Limits", "Access", "Logs and end"


def _engine(help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=_ENGINE, **more)


def _limits(help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=_LIMITS, **more)


def _access(help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=_ACCESS, **more)


def _logs(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_LOGS, **more)


def serve(
    model: Annotated[
        str, typer.Argument(help="nano, a checkpoint's folder, a GGUF file, or a hub id.", metavar="MODEL")
    ] = "nano",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What requests call the model; give it again for more names.")
    ] = None,
    max_model_len: Annotated[int | None, _engine("Longest prompt and answer together, in tokens.")] = None,
    max_num_seqs: Annotated[int, _engine("Answers made at the same time; others wait.", min=1)] = 64,
    max_batched_tokens: Annotated[int, _engine("Tokens in one step; less is smoother.", min=1)] = 2048,
    cache_tokens: Annotated[
        int | None, _engine("Size of the cache; default: what is of use and fits.")
    ] = None,
    memory: Annotated[
        str | None, _engine("Keep to so much, such as 12GB: experts are read from disk when needed.")
    ] = None,
    speculation: Annotated[str, _engine("Tokens guessed ahead: auto, off, or a number.")] = "auto",
    deterministic: Annotated[
        bool, _engine("Answers do not depend on what else runs, to the bit; slower.")
    ] = False,
    no_prefix_caching: Annotated[bool, _engine("Read every prompt anew.")] = False,
    dtype: Annotated[str, _engine("auto, bfloat16 or float32.")] = "auto",
    device: Annotated[str, _engine("auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int | None, _engine("CPU threads; default: one for a small model, else all cores.", min=1)
    ] = None,
    seed: Annotated[int, _engine("For requests that bring none.")] = 0,
    api_keys: Annotated[
        Path | None, _access("File of API keys (dsv3 keys); default: nobody is asked for one.")
    ] = None,
    protect_metrics: Annotated[bool, _access("Ask for a key at /metrics too.")] = False,
    allowed_host: Annotated[
        list[str] | None, _access("A name that requests may call us by, as a proxy does; again for more.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, _access("Web pages from here may use the API; give it again for more.")
    ] = None,
    tls_cert: Annotated[Path | None, _access("Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, _access("Its private key, PEM.")] = None,
    root_path: Annotated[str, _access("Path under which a proxy shows us.")] = "",
    no_page: Annotated[bool, _access("No chat page at /.")] = False,
    rate_limit: Annotated[int | None, _limits("Requests a minute of one key.", min=1)] = None,
    max_concurrent: Annotated[int | None, _limits("Answers for one key at the same time.", min=1)] = None,
    max_waiting: Annotated[int, _limits("Answers that may wait for a place.", min=1)] = 1024,
    max_body: Annotated[int, _limits("Longest request, in bytes.", min=1024)] = 4 * 2**20,
    request_timeout: Annotated[float, _limits("Seconds until an answer must be complete.", min=0.1)] = 600.0,
    keep_alive: Annotated[
        float, _limits("Seconds after which a silent stream gets a comment; 0: never.", min=0)
    ] = 15.0,
    access_log: Annotated[
        bool,
        _logs("--access-log/--no-access-log", help="A line of JSON for each request, on standard output."),
    ] = True,
    log_prompts: Annotated[bool, _logs(help="What was asked goes into the access log.")] = False,
    drain: Annotated[float, _logs(help="Seconds for requests under way when told to stop.", min=0)] = 30.0,
) -> None:
    """Serve a model by OpenAI's API, with a page to chat on."""
    from dsv3.server.app import create_app
    from dsv3.server.run import check_tls, open_socket
    from dsv3.server.run import serve as run
    from dsv3.server.settings import Settings

    settings = Settings(
        served_model_names=tuple(served_model_name or [_name(model)]),
        host=host,
        port=port,
        allowed_hosts=tuple(allowed_host or ()),
        root_path=root_path,
        api_keys=api_keys,
        protect_metrics=protect_metrics,
        rate_limit=rate_limit,
        max_concurrent=max_concurrent,
        max_body=max_body,
        request_timeout=request_timeout,
        keep_alive=keep_alive,
        cors_origins=tuple(cors_origin or ()),
        tls_cert=tls_cert,
        tls_key=tls_key,
        access_log=access_log,
        log_prompts=log_prompts,
        drain=drain,
        page=not no_page,
    )
    check_tls(settings)

    def engine() -> AsyncEngine:
        from dsv3.engine.async_engine import AsyncEngine
        from dsv3.engine.llm import LLM
        from dsv3.engine.sampling import SamplingParams

        llm = LLM(
            model,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            cache_tokens=cache_tokens,
            memory=memory,
            speculation=number_or_word(speculation),  # what is neither, the engine refuses
            deterministic=deterministic,
            prefix_caching=not no_prefix_caching,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
        llm.use_threads(threads)
        llm.generate(
            [[0]], SamplingParams(max_tokens=2)
        )  # compiles the kernels before anybody waits for them
        return AsyncEngine(llm, max_waiting=max_waiting)

    app = create_app(engine, settings)
    taken = open_socket(settings)
    _set_up_logs()
    port = taken.getsockname()[1]
    run(app, settings, taken, lambda: _say_ready(settings, port))


def _name(model: str) -> str:
    """What a model is called if nobody says: a folder or GGUF file by its last part, anything else as it is."""
    from dsv3.gguf import is_gguf

    if is_gguf(Path(model)):
        return Path(model).stem
    return Path(model).resolve().name if Path(model).is_dir() else model


def _set_up_logs() -> None:
    """Notes go to standard error, the access log to standard output, each line whole."""
    notes = logging.StreamHandler()
    notes.setFormatter(logging.Formatter("dsv3: %(message)s"))
    lines = logging.StreamHandler(sys.stdout)
    lines.setFormatter(logging.Formatter("%(message)s"))
    for name, handler, level in (
        ("dsv3", notes, logging.INFO),
        ("uvicorn", notes, logging.ERROR),
        ("dsv3.server.access", lines, logging.INFO),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.raiseExceptions = (
        False  # nobody reads the log: no reason to stop serving, nor to say so each time
    )


def _say_ready(settings: Settings, port: int) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"{'http' if settings.tls_cert is None else 'https'}://{host}:{port}{settings.root_path}"
    names = ", ".join(settings.served_model_names)
    page = f", page at {url}/" if settings.page else ""
    keys = (
        ""
        if settings.api_keys or settings.local
        else "; no key is asked for: whoever reaches this may use it"
    )
    print(f"dsv3: serving {names} at {url}/v1{page}{keys}", file=sys.stderr, flush=True)
