"""The chat page: a few files that come with the package, held in memory.

They may load nothing from elsewhere and speak with nobody but us: the Content-Security-Policy says so to the browser,
which then keeps to it even if an answer of the model should smuggle something into the page. Scripts and styles that
stand inside the HTML are allowed by their hashes, so nothing that is added later runs.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "webmanifest": "application/manifest+json",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "woff2": "font/woff2",
}
_INLINE = re.compile(rb"<(script|style)\b([^>]*)>(.*?)</\1\s*>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class File:
    content: bytes
    headers: dict[str, str]


def load(folder: Traversable | None = None) -> dict[str, File]:
    """The page's files by the path at which they are served; none where there is no page."""
    folder = folder or files("dsv3.server") / "page"
    if not folder.is_dir():
        return {}
    found: dict[str, File] = {}
    for entry in folder.iterdir():
        kind = _TYPES.get(entry.name.rpartition(".")[2])
        if kind is None or not entry.is_file():
            continue
        content = entry.read_bytes()
        headers = {
            "content-type": kind,
            "cache-control": "no-cache",
            "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
            "content-security-policy": _policy(content if kind.startswith("text/html") else b""),
        }
        file = File(content, headers)
        found[f"/{entry.name}"] = file
        if entry.name == "index.html":
            found["/"] = file
    return found


def answer(file: File, request: Request) -> Response:
    if request.headers.get("if-none-match") == file.headers["etag"]:
        return Response(status_code=304, headers=file.headers)
    return Response(file.content, headers=file.headers)


def _policy(html: bytes) -> str:
    allowed: dict[str, list[str]] = {"script": ["'self'"], "style": ["'self'"]}
    for tag, attributes, text in _INLINE.findall(html):
        if b"src=" not in attributes:
            digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
            allowed[tag.decode().lower()].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; script-src {' '.join(allowed['script'])}; style-src {' '.join(allowed['style'])}; "
        "img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
