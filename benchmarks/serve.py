"""The server under load, and side by side with llama.cpp's `llama-server` on the same weights.

    python benchmarks/serve.py peers --llama-server PATH     # requests/s and tokens/s at 1, 8, 32 clients, both servers
    python benchmarks/serve.py load --rate 8 --seconds 60    # arrivals at random times, whoever is still waiting
    python benchmarks/serve.py streams --clients 200         # so many at the same moment, none may be lost
    python benchmarks/serve.py soak --minutes 10             # random requests and hang-ups; memory must stay flat
    python benchmarks/serve.py speculation                   # acceptance and speed on stories and dialogues
    python benchmarks/serve.py deterministic                 # what it costs that answers do not depend on company

Everything goes over HTTP as from any client: /v1/completions with `stream`, on this machine, so that the cores are
shared by server and clients alike. Prompts begin with the same `--prefix` tokens and end differently, as those of one
application with one system prompt do; answers are greedy and have exactly `--tokens` tokens. A server is started for each measurement
and stopped after it; `--url` measures one that runs already.

Times are of what a client sees: to the first event with text, and between events. (A server that speculates sends more
than one token in an event now and then.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from dsv3.text import Tokenizer

THREADS = 2


# Servers ------------------------------------------------------------------------------------------------


@dataclass
class Server:
    name: str
    url: str
    process: psutil.Process | None = None

    @property
    def memory(self) -> int:
        """Bytes resident."""
        return 0 if self.process is None else self.process.memory_info().rss


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(name: str, command: list[str], port: int, ready: str, log: Path) -> Iterator[Server]:
    """A server process, from when it answers at `ready` to the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(until_ready(url + ready, process, log))
        yield Server(name, url, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(timeout=60)


async def until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(1200):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}:\n{log.read_text()[-2000:]}")
            try:
                async with session.get(url) as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    raise SystemExit(f"{url} did not come up:\n{log.read_text()[-2000:]}")


@contextmanager
def ours(args: argparse.Namespace, *flags: str) -> Iterator[Server]:
    if args.url:
        yield Server("dsv3", args.url)
        return
    port = free_port()
    command = [sys.executable, "-m", "dsv3", "serve", args.model, "--port", str(port), "--no-access-log"]
    command += [*flags, *shlex.split(args.serve_flags)]
    with (
        tempfile.TemporaryDirectory() as folder,
        running("dsv3", command, port, "/ready", Path(folder, "log")) as server,
    ):
        yield server


@contextmanager
def llama(args: argparse.Namespace, clients: int) -> Iterator[Server]:
    """llama-server with a slot for each client, and with what was fastest for it of the settings that we tried."""
    port = free_port()
    context = clients * (args.prefix + args.tokens + 64)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(args.gguf) if args.gguf else Path(folder, "model.gguf")
        if not args.gguf:
            convert = [sys.executable, "-m", "dsv3", "convert", args.model, str(weights), "--to", "gguf"]
            subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        command = [args.llama_server, "-m", str(weights), "--port", str(port), "-np", str(clients)]
        command += [
            "-c",
            str(context),
            "-t",
            str(THREADS),
            "-tb",
            str(THREADS),
            *shlex.split(args.llama_flags),
        ]
        with running("llama-server", command, port, "/health", Path(folder, "log")) as server:
            yield server


# Clients ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one client saw of one request. Seconds."""

    started: float
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


WORDS = [
    "the",
    "fox",
    "ran",
    "over",
    "the",
    "hill",
    "and",
    "the",
    "old",
    "king",
    "looked",
    "at",
    "the",
    "moon",
    "while",
    "a",
    "small",
    "bird",
    "sang",
    "in",
    "the",
    "garden",
    "of",
    "the",
    "miller",
    "who",
    "had",
    "three",
    "sons",
    "and",
    "no",
    "bread",
    "for",
    "the",
    "winter",
    "so",
    "he",
    "went",
    "to",
    "the",
    "sea",
]


class Prompts:
    """Texts of about so many tokens that begin alike and end differently, made of the words of a seed."""

    def __init__(self, model: str, prefix: int, seed: int = 0) -> None:
        tokenizer = Tokenizer.from_pretrained(model_folder(model))
        rng = random.Random(seed)
        text = "Once upon a time"
        while len(tokenizer.encode(text)) < prefix:
            text += " " + " ".join(rng.choices(WORDS, k=max(1, (prefix - len(tokenizer.encode(text))) // 2)))
        self.prefix = text

    def __call__(self, number: int) -> str:
        rng = random.Random(number)
        return f"{self.prefix}. {' '.join(rng.choices(WORDS, k=12))}"


def model_folder(model: str) -> Path:
    from dsv3.checkpoint.hub import resolve

    return resolve(model)


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    leave_after: int | None = None,
    tries: int = 5,
) -> Outcome:
    """One request; with leave_after the client hangs up after so many events."""
    outcome = Outcome(time.perf_counter())
    events = 0
    try:
        async with session.post(f"{url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                outcome.error = f"{reply.status}: {(await reply.text())[:200]}"
                return outcome
            async for line in reply.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                now = time.perf_counter()
                if outcome.first is None:
                    outcome.first = now
                else:
                    outcome.gaps.append(now - outcome.last)
                outcome.last = now
                events += 1
                if leave_after is not None and events >= leave_after:
                    break
            else:
                outcome.tokens = body["max_tokens"]
    except (TimeoutError, aiohttp.ClientError) as error:
        stale = isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)
        if stale and outcome.first is None and tries:  # a kept connection that the server had closed
            return await ask(session, url, body, leave_after, tries - 1)
        outcome.error = repr(error)
    return outcome


def body(prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0,
        **more,
    }


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
    )


async def closed_loop(
    url: str, model: str, prompts: Prompts, clients: int, seconds: float, tokens: int
) -> list[Outcome]:
    """So many clients, each with one request at a time."""
    outcomes: list[Outcome] = []
    numbers = iter(range(10**9))

    async def client(web: aiohttp.ClientSession) -> None:
        while time.perf_counter() < end:
            outcomes.append(await ask(web, url, body(prompts(next(numbers)), tokens, model=model)))

    async with session() as web:
        end = time.perf_counter()  # the first answers fill the caches, and are not counted
        await asyncio.gather(*(client_once(web, url, model, prompts, tokens, i) for i in range(clients)))
        end = time.perf_counter() + seconds
        await asyncio.gather(*(client(web) for _ in range(clients)))
    return outcomes


async def client_once(
    web: aiohttp.ClientSession, url: str, model: str, prompts: Prompts, tokens: int, number: int
) -> None:
    await ask(web, url, body(prompts(10**6 + number), tokens, model=model))


async def open_loop(
    url: str, model: str, prompts: Prompts, rate: float, seconds: float, tokens: int
) -> list[Outcome]:
    """Requests at random times (a Poisson process), however many are under way."""
    rng = random.Random(1)
    tasks = []
    async with session() as web:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            number = len(tasks)
            tasks.append(asyncio.create_task(ask(web, url, body(prompts(number), tokens, model=model))))
            await asyncio.sleep(rng.expovariate(rate))
        return await asyncio.gather(*tasks)


# Reports ------------------------------------------------------------------------------------------------


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [float("nan")]
    return {f"p{p}": ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] * 1000 for p in (50, 95, 99)}


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Rates over the time from the first start to the last event; milliseconds."""
    done = [o for o in outcomes if o.error is None and o.first is not None]
    span = max((o.last for o in done), default=0.0) - min((o.started for o in outcomes), default=0.0)
    return {
        "requests": len(outcomes),
        "lost": len(outcomes) - len(done),
        "requests_per_s": len(done) / span if span > 0 else 0.0,
        "tokens_per_s": sum(o.tokens for o in done) / span if span > 0 else 0.0,
        "ttft_ms": percentiles([o.first - o.started for o in done if o.first is not None]),
        "gap_ms": percentiles([gap for o in done for gap in o.gaps]),
        "errors": sorted({o.error for o in outcomes if o.error is not None})[:5],
    }


def show(name: str, result: dict[str, Any]) -> None:
    ttft, gap = result["ttft_ms"], result["gap_ms"]
    print(
        f"{name:28} {result['requests']:5} requests, {result['lost']} lost   {result['requests_per_s']:6.2f} req/s"
        f" {result['tokens_per_s']:7.0f} tok/s   first {ttft['p50']:.0f} / {ttft['p95']:.0f} / {ttft['p99']:.0f} ms"
        f"   between {gap['p50']:.1f} / {gap['p95']:.1f} / {gap['p99']:.1f} ms",
        flush=True,
    )
    for error in result["errors"]:
        print(f"    {error}")


# What can be measured -----------------------------------------------------------------------------------


def peers(args: argparse.Namespace) -> dict[str, Any]:
    prompts = Prompts(args.model, args.prefix)
    results: dict[str, Any] = {}
    for clients in args.clients:
        for _ in range(args.rounds):  # in turn, so that a machine that slows down slows both
            with ours(args, "--threads", str(args.threads)) as server:
                measured = asyncio.run(
                    closed_loop(server.url, name_of(args), prompts, clients, args.seconds, args.tokens)
                )
                results.setdefault(f"dsv3 x{clients}", []).append(summary(measured))
                show(f"dsv3, {clients} clients", results[f"dsv3 x{clients}"][-1])
            if args.llama_server:
                with llama(args, clients) as server:
                    measured = asyncio.run(
                        closed_loop(server.url, "model", prompts, clients, args.seconds, args.tokens)
                    )
                    results.setdefault(f"llama-server x{clients}", []).append(summary(measured))
                    show(f"llama-server, {clients} clients", results[f"llama-server x{clients}"][-1])
    if args.llama_server:
        print(
            "\n| clients | dsv3 tokens/s | llama-server tokens/s | ratio | dsv3 req/s | llama-server req/s |"
        )
        print("|---|---|---|---|---|---|")
        for clients in args.clients:
            rows = [results[f"{name} x{clients}"] for name in ("dsv3", "llama-server")]
            (a, b), (c, d) = (
                [sorted(r[key] for r in row)[len(row) // 2] for row in rows]
                for key in ("tokens_per_s", "requests_per_s")
            )
            print(f"| {clients} | {a:.0f} | {b:.0f} | {a / b:.2f} | {c:.1f} | {d:.1f} |")
    return results


def load(args: argparse.Namespace) -> dict[str, Any]:
    prompts = Prompts(args.model, args.prefix)
    with ours(args, "--threads", str(args.threads)) as server:
        outcomes = asyncio.run(
            open_loop(server.url, name_of(args), prompts, args.rate, args.seconds, args.tokens)
        )
    result = summary(outcomes)
    show(f"{args.rate:g} arrivals/s", result)
    return result


def streams(args: argparse.Namespace) -> dict[str, Any]:
    prompts = Prompts(args.model, args.prefix)

    async def all_at_once(url: str) -> list[Outcome]:
        async with session() as web:
            bodies = [body(prompts(i), args.tokens, model=name_of(args)) for i in range(args.clients[0])]
            return await asyncio.gather(*(ask(web, url, one) for one in bodies))

    with ours(args, "--max-num-seqs", str(args.clients[0]), "--threads", str(args.threads)) as server:
        result = summary(asyncio.run(all_at_once(server.url)))
    show(f"{args.clients[0]} streams at once", result)
    return result


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Eight clients that ask for all kinds of things and often hang up; the server's memory every 5 seconds."""
    prompts = Prompts(args.model, args.prefix)
    rng = random.Random(0)
    memory: list[tuple[float, int]] = []
    outcomes: list[Outcome] = []

    async def client(web: aiohttp.ClientSession, server: Server, end: float) -> None:
        while time.perf_counter() < end:
            tokens = rng.choice([1, 10, 60, 200])
            leaves = rng.choice([None, None, 1, rng.randrange(1, tokens + 1)])
            asked = body(prompts(rng.randrange(50)), tokens, model=name_of(args), n=rng.choice([1, 1, 1, 3]))
            outcomes.append(await ask(web, server.url, asked, leaves))

    async def watch(server: Server, end: float) -> None:
        began = time.perf_counter()
        while (now := time.perf_counter()) < end:
            memory.append((now - began, server.memory))
            await asyncio.sleep(5)

    async def idle(server: Server) -> dict[str, float]:
        async with session() as web, web.get(f"{server.url}/metrics") as reply:
            text = await reply.text()
        return {m[1]: float(m[2]) for m in re.finditer(r"^(dsv3_\w+)(?:{[^}]*})? ([\d.e+]+)$", text, re.M)}

    async def everything(server: Server) -> dict[str, float]:
        end = time.perf_counter() + 60 * args.minutes
        async with session() as web:
            await asyncio.gather(*(client(web, server, end) for _ in range(8)), watch(server, end))
        await asyncio.sleep(2)
        return await idle(server)

    with ours(args, "--threads", str(args.threads)) as server:
        gauges = asyncio.run(everything(server))
    result = summary([o for o in outcomes if o.tokens])
    show("soak", result)
    errors = [o.error for o in outcomes if o.error]
    third = [rss for seconds, rss in memory if seconds > 20 * args.minutes]  # the last two thirds
    drift = (sum(third[-5:]) / 5 - sum(third[:5]) / 5) / 2**20 if len(third) >= 10 else float("nan")
    print(
        f"{len(outcomes)} requests, {len(errors)} errors; memory {memory[0][1] / 2**20:.0f} MiB at first, "
        f"{memory[-1][1] / 2**20:.0f} MiB at the end, {drift:+.1f} MiB over the last two thirds"
    )
    print(
        "still in use afterwards:", {k: v for k, v in gauges.items() if re.search("running|waiting|used", k)}
    )
    return {**result, "memory": memory, "gauges": gauges, "errors": errors[:10]}


def speculation(args: argparse.Namespace) -> dict[str, Any]:
    """One client, greedy and sampled: with guesses and without."""
    asked = {
        "story": "Tell me a story about a fox.",
        "dialogue": "I would like to book a table for two at an Italian restaurant.",
    }
    results: dict[str, Any] = {}
    for kind, message in asked.items():
        for temperature in (0.0, 0.6):
            rates: dict[str, float] = {}
            accepted = float("nan")
            for way in ("off", "1", "2"):
                with ours(args, "--speculation", way, "--threads", str(args.threads)) as server:
                    measured, counts = asyncio.run(_chat(server.url, name_of(args), message, temperature))
                rates[way] = measured
                drafted = counts.get("dsv3_drafted_tokens_total", 0.0)
                if way == "1" and drafted:
                    accepted = counts["dsv3_accepted_tokens_total"] / drafted
            results[f"{kind} T={temperature}"] = {"accepted": accepted, **rates}
            print(
                f"{kind:9} temperature {temperature}: {accepted:.0%} accepted; {rates['off']:.0f} tok/s without, "
                f"{rates['1']:.0f} with one guess ({rates['1'] / rates['off']:.2f}x), {rates['2']:.0f} with two "
                f"({rates['2'] / rates['off']:.2f}x)",
                flush=True,
            )
    return results


def deterministic(args: argparse.Namespace) -> dict[str, Any]:
    """What it costs that nobody's answer depends on the others: in bf16, whose kernels see to it, and in fp32."""
    prompts = Prompts(args.model, args.prefix)
    results: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32"):
        for flags in ((), ("--deterministic",)):
            with ours(args, "--threads", str(args.threads), "--dtype", dtype, *flags) as server:
                measured = asyncio.run(
                    closed_loop(
                        server.url, name_of(args), prompts, args.clients[0], args.seconds, args.tokens
                    )
                )
            name = " ".join((dtype, *flags))
            results[name] = summary(measured)
            show(name, results[name])
    return results


async def _chat(url: str, model: str, message: str, temperature: float) -> tuple[float, dict[str, float]]:
    tokens, seconds = 0, 0.0
    async with session() as web:
        for seed in range(-2, 20):
            asked = {
                "model": model,
                "messages": [{"role": "user", "content": message}],
                "temperature": temperature,
                "max_tokens": 200,
                "seed": abs(seed),
            }
            began = time.perf_counter()
            async with web.post(f"{url}/v1/chat/completions", json=asked) as reply:
                usage = (await reply.json())["usage"]
            if seed >= 0:
                tokens += usage["completion_tokens"]
                seconds += time.perf_counter() - began
        async with web.get(f"{url}/metrics") as reply:
            text = await reply.text()
    counts = {m[1]: float(m[2]) for m in re.finditer(r"^(dsv3_\w+)(?:{[^}]*})? ([\d.e+]+)$", text, re.M)}
    return tokens / seconds, counts


def name_of(args: argparse.Namespace) -> str:
    return Path(args.model).name


MEASURES = {
    "peers": peers,
    "load": load,
    "streams": streams,
    "soak": soak,
    "speculation": speculation,
    "deterministic": deterministic,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(MEASURES))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--url", help="a dsv3 server that runs already")
    parser.add_argument("--serve-flags", default="", help="further flags of dsv3 serve")
    parser.add_argument("--threads", type=int, default=1, help="of dsv3; llama-server always has 2")
    parser.add_argument("--llama-server", help="the program; without it peers measures dsv3 alone")
    parser.add_argument("--llama-flags", default="-fa on -no-kvu --no-webui")
    parser.add_argument("--gguf", help="the same weights for llama-server (default: converted here)")
    parser.add_argument("--clients", type=int, nargs="+", default=None)
    parser.add_argument("--prefix", type=int, default=1000, help="tokens that all prompts begin with")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=8, help="arrivals a second")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    args.clients = args.clients or {"streams": [200], "deterministic": [8]}.get(args.what, [1, 8, 32])
    result = MEASURES[args.what](args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
