"""API keys: who may ask.

A key is 256 random bits, so nobody guesses one, and a plain SHA-256 of it is all that we keep: whoever reads the
file has no key. (Passwords need slow, salted hashes because people choose them; nobody chose these.) The file is
JSON that its owner alone can read:

    {"keys": [{"name": "ada", "sha256": "9f86...", "created": "2025-01-31"}]}

A running server reads it again when it has changed, so a key can be added or taken away without a restart. Where it
cannot be read, being broken or shut, the keys stay as they were, and the log says so every minute; where it is gone, so
are the keys.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from dsv3.errors import UserError
from dsv3.files import in_turn, write_whole

_PREFIX = "sk-dsv3-"
_NAME = re.compile(r"[\w.@-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_LOOK_EVERY = 1.0  # seconds between two looks at the file
_COMPLAIN_EVERY = 60.0  # seconds between two lines in the log about a file that cannot be read

log = logging.getLogger("dsv3.server")


@dataclass(frozen=True)
class Key:
    name: str
    sha256: str
    created: str = ""


def read_keys(path: Path) -> list[Key]:
    """The keys of a file; raises UserError if it is missing or is not one."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["keys"]
        keys = [Key(**entry) for entry in listed]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: make it with `dsv3 keys add NAME --file {path}`") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no file of keys ({error!r}): make one with `dsv3 keys add`") from None
    for key in keys:
        if not isinstance(key.sha256, str) or not _HASH.fullmatch(key.sha256):
            raise UserError(f"{path}: the key of {key.name!r} is no SHA-256: remove it and add it again")
        _check_name(key.name)
    return keys


def write_keys(path: Path, keys: list[Key]) -> None:
    """Write the file so that it appears whole; a new one is for its owner's eyes alone."""
    write_whole(path, json.dumps({"keys": [asdict(key) for key in keys]}, indent=1) + "\n", mode=0o600)


def add_key(path: Path, name: str) -> str:
    """Give a new key to `name` and return it: this is the only time that anybody sees it."""
    _check_name(name)
    secret = _PREFIX + secrets.token_urlsafe(32)
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder: make it first")
    with in_turn(path.parent):
        keys = read_keys(path) if path.exists() else []
        if any(key.name == name for key in keys):
            raise UserError(f"{name!r} has a key in {path}: remove it first, or choose another name")
        write_keys(path, [*keys, Key(name, _hash(secret), datetime.now(UTC).date().isoformat())])
    return secret


def remove_key(path: Path, name: str) -> None:
    read_keys(path)  # a file that is missing is said so before its folder is
    with in_turn(path.parent):
        keys = read_keys(path)
        kept = [key for key in keys if key.name != name]
        if len(kept) == len(keys):
            names = ", ".join(key.name for key in keys) or "nobody"
            raise UserError(f"{name!r} has no key in {path}: it holds those of {names}")
        write_keys(path, kept)


class KeyRing:
    """The keys of a running server."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._stamp()
        self._looked = monotonic()
        self._complained = -_COMPLAIN_EVERY
        self._keys = read_keys(path)

    def find(self, presented: str) -> Key | None:
        """Whose key this is. It takes as long for a wrong one as for any right one."""
        self._reload()
        digest = _hash(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _reload(self) -> None:
        now = monotonic()
        if now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        stamp = self._stamp()
        if stamp == self._seen:
            return
        try:
            self._keys = read_keys(self._path) if stamp is not None else []
        except UserError as error:
            if now - self._complained >= _COMPLAIN_EVERY:
                self._complained = now
                log.error("the keys stay as they were: %s", error)
            return
        self._seen = stamp
        if stamp is None:
            log.error("%s is gone: no key is valid until it is back", self._path)
        else:
            log.info("%s: %d keys", self._path, len(self._keys))

    def _stamp(self) -> Any:
        """What changes with the file; None where it is gone."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            return error.errno
        return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"the name {name!r} will not do: take up to 64 letters, digits and . _ - @")
