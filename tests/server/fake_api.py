"""An OpenAI API that answers by heart, for tests of the page: what is asked decides what comes back.

It serves the page under the Content-Security-Policy that the page must bear. `python -m tests.server.fake_api`
serves it at 127.0.0.1:8765, to look at in a browser.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE = Path(__file__).parents[2] / "src" / "dsv3" / "server" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MAX_MODEL_LEN = 4096

RICH = """# A fox in the *snow*

Once there was a **small fox** who lived by the [river](https://example.org/river_(north)).
She had `three` plans and ~~no~~ one map.

1. Sleep until noon
   - under the **old** oak
   - or in the hay:
     1. the left barn
     2. the right one
2. Catch a fish
3. Count the stars

- [x] pack a lunch
- [ ] find the moon

> The snow does not ask where you come from.
>
> — an owl

| Animal | Legs | Said |
|:-------|-----:|:----:|
| fox    |    4 | `yip` |
| owl    |    2 | who \\| whom |

```python
import math

def stars(night: int) -> float:
    \"\"\"How many stars a fox counts
    in one night.\"\"\"
    count = 3.5e2  # and a few
    return math.sqrt(count) * night if night > 0 else 0
```

---

Where \\(x_1 * y_1 * z\\) is the snow, see https://example.org/snow. The end.
"""

HOSTILE = """<img src=x onerror="window.hacked = true"> <script>window.hacked = true</script>

[one](javascript:window.hacked=true) [two](JaVaScRiPt:window.hacked=true) [three](data:text/html,<script>)
[four](&#106;avascript:alert(1)) <javascript:alert(1)> ![five](https://example.org/pixel.png)
[six](//example.org) [seven](https://example.org/fine" onmouseover="window.hacked=true)

```"><img src=x onerror=window.hacked=true>
<img src=x onerror=window.hacked=true>
```

| <b onclick=1>x</b> | y |
|---|---|
| <svg onload=window.hacked=true> | [mail](mailto:fox@example.org) |
"""


class FakeApi:
    """`requests`: bodies of the completions asked for. `hung_up`: answers that were left before their end."""

    def __init__(self) -> None:
        self.reset()
        routes = [
            Route("/v1/models", self.list_models),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
        self.app = Starlette(
            routes=[Mount("/prefix", routes=routes), *routes], middleware=[Middleware(Policy)]
        )

    def reset(self) -> None:
        self.models = ["little-fox"]
        self.delay = 0.0
        """Seconds between two chunks of an answer."""
        self.key: str | None = None
        """The API key that is asked for."""
        self.down = False
        """Answer nothing but 503."""
        self.requests: list[dict[str, Any]] = []
        self.hung_up = 0

    def refusal(self, request: Request) -> Response | None:
        if self.down:
            return error(503, "the model is being loaded")
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, "no valid API key was given", "invalid_api_key")
        return None

    async def list_models(self, request: Request) -> Response:
        models = [{"id": name, "object": "model", "max_model_len": MAX_MODEL_LEN} for name in self.models]
        return self.refusal(request) or JSONResponse({"object": "list", "data": models})

    async def complete(self, request: Request) -> Response:
        refusal = self.refusal(request)
        if refusal:
            return refusal
        body = await request.json()
        self.requests.append(body)
        asked = body["messages"][-1]["content"]
        if "busy" in asked:
            return error(429, "too many requests are waiting", headers={"Retry-After": "3"})
        if "too much" in asked:
            return error(
                400, "5000 tokens are more than the 4096 of max_model_len", "context_length_exceeded"
            )
        return StreamingResponse(self.stream(asked, body["model"]), media_type="text/event-stream")

    async def stream(self, asked: str, model: str) -> AsyncIterator[str]:
        thoughts = "The user wants a *story*. " if "think" in asked else ""
        answer = self.answer(asked)
        try:
            yield event({"role": "assistant", "content": ""}, model)
            for piece in pieces(thoughts):
                await asyncio.sleep(self.delay)
                yield event({"reasoning_content": piece}, model)
            for i, piece in enumerate(pieces(answer)):
                await asyncio.sleep(self.delay)
                yield event({"content": piece}, model)
                if "drop" in asked and i == 2:
                    return
                if "break" in asked and i == 2:
                    yield f"data: {json.dumps({'error': {'message': 'the engine stopped'}})}\n\n"
                    return
            yield event({}, model, "length" if "cut" in asked else "stop")
            usage = {"prompt_tokens": 1200, "completion_tokens": len(pieces(answer))}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
        except (GeneratorExit, asyncio.CancelledError):
            self.hung_up += 1
            raise

    def answer(self, asked: str) -> str:
        if "rich" in asked:
            return RICH
        if "hostile" in asked:
            return HOSTILE
        if "slow" in asked:
            return "".join(f"Line {i} of a story that goes on and on.\n\n" for i in range(400))
        return f"Answer {len(self.requests)} to: **{asked}**"


class Policy:
    """Sends the page's Content-Security-Policy with everything."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"content-security-policy", POLICY.encode()))
            await send(message)

        await self.app(scope, receive, with_policy)


def pieces(text: str) -> list[str]:
    return [text[i : i + 6] for i in range(0, len(text), 6)]


def event(delta: dict[str, str], model: str, finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'model': model, 'choices': [choice]})}\n\n"


def error(
    status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    return JSONResponse({"error": {"message": message, "code": code}}, status, headers)


@contextmanager
def served(api: FakeApi) -> Iterator[str]:
    """Serves on a free port, from a thread; gives the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(api.app, log_level="warning", timeout_graceful_shutdown=1, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


if __name__ == "__main__":
    api = FakeApi()
    api.delay = 0.02
    uvicorn.run(api.app, port=8765)
