"""What the server is told when it starts: checked once, then never changed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

from dsv3.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""The names of this machine as it speaks to itself."""


@dataclass(frozen=True)
class Settings:
    """The server's settings. Raises UserError where one is out of range."""

    served_model_names: tuple[str, ...] = ("dsv3",)
    """What requests may call the model; the first is what it calls itself."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a Host header may hold besides this machine's own; none and not `local`: any."""
    root_path: str = ""
    """The prefix under which a reverse proxy shows us, such as /llm."""
    api_keys: Path | None = None
    """The file of keys (`dsv3 keys`); None asks nobody for one."""
    protect_metrics: bool = False
    """Whether /metrics asks for a key too."""
    rate_limit: int | None = None
    """Requests a minute of one key."""
    max_concurrent: int | None = None
    """Answers for one key that may be under way at once; embeddings are one for a request."""
    max_body: int = 4 * 2**20
    """The longest body of a request, in bytes."""
    request_timeout: float = 600.0
    """Seconds from the arrival of a request to the end of its answer."""
    body_timeout: float = 30.0
    """Seconds until the body of a request must have arrived."""
    keep_alive: float = 15.0
    """Seconds without an event after which a stream gets a comment; 0 writes none."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may read our answers; none by default."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    access_log: bool = True
    log_prompts: bool = False
    """Whether the access log holds what was asked."""
    drain: float = 30.0
    """Seconds that requests under way are given to finish after SIGTERM."""
    page: bool = True
    """Whether the chat page is served at /."""

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise UserError(f"served_model_names is {self.served_model_names!r}: give at least one name")
        for field in fields(self):
            value, limits = getattr(self, field.name), _RANGES.get(field.name)
            if limits and value is not None and not limits[0] <= value <= limits[1]:
                upper = "" if limits[1] == math.inf else f" and at most {limits[1]:,}"
                raise UserError(f"{field.name} is {value}: it must be at least {limits[0]:,}{upper}")
        object.__setattr__(self, "allowed_hosts", tuple(map(_host, self.allowed_hosts)))
        for origin in self.cors_origins:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or f"{parts.scheme}://{parts.netloc}" != origin:
                raise UserError(
                    f"cors_origins has {origin!r}: name each origin whole, such as https://chat.example.org"
                )
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise UserError(f"root_path is {self.root_path!r}: it must begin with / and not end with it")
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_cert" if self.tls_cert is None else "tls_key"
            raise UserError(f"{missing} is missing: TLS needs the certificate and its key")

    @property
    def local(self) -> bool:
        """Whether nobody but this machine can reach us."""
        return self.host in LOOPBACK


def _host(name: str) -> str:
    """A name as the Host header is compared with: in small letters, an IPv6 address in brackets."""
    bare = name.strip("[]") if name.startswith("[") and name.endswith("]") else name
    if bare.count(":") > 1 and re.fullmatch(r"[0-9a-fA-F:.]+", bare):
        return f"[{bare.lower()}]"
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UserError(
            f"allowed_hosts has {name!r}: give a name alone, such as llm.example.org, without scheme, port or path"
        )
    return name.lower()


_RANGES: Mapping[str, tuple[float, float]] = {
    "port": (0, 65535),
    "rate_limit": (1, math.inf),
    "max_concurrent": (1, math.inf),
    "max_body": (1024, 2**30),
    "request_timeout": (0.1, 86400),
    "body_timeout": (0.1, 86400),
    "keep_alive": (0, 86400),
    "drain": (0, 86400),
}
