"""Who may call: keys in a file, one in each line, as `NAME = KEY` or the key alone. Without a file, this machine may.

A key is sent as `Authorization: Bearer KEY`, or as the password of HTTP Basic.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from sdopt.errors import UsageError

SHORTEST = 16  # characters


@dataclass(frozen=True)
class Keys:
    """Hashes of the keys by the name of their owner; empty where no key is needed."""

    hashes: dict[str, bytes]

    @classmethod
    def read(cls, path: str) -> Keys:
        """The keys in a file. Raises: UsageError for a file that has none, or one that is easily guessed."""
        if not path:
            return cls({})
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise UsageError(f"--api-key-file {path} cannot be read: {error}") from error
        hashes: dict[str, bytes] = {}
        for number, line in enumerate(lines, 1):
            name, equals, key = (part.strip() for part in line.partition("="))
            if not name or name.startswith("#"):
                continue
            if not equals or not key:
                name, key = f"key-{number}", line.strip()
            if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or "/" in name or name in hashes:
                text = f"a key of {SHORTEST} or more printable ASCII characters, and a name that is there once"
                raise UsageError(f"--api-key-file {path}, line {number}: allowed is NAME = KEY with {text}")
            hashes[name] = _hash(key)
        if not hashes:
            raise UsageError(f"--api-key-file {path} has no key; write one in each line: NAME = KEY")
        return cls(hashes)

    def owner(self, authorization: str) -> str | None:
        """Whose key an Authorization header has; None if nobody's. All keys are compared, whichever it is."""
        given = _hash(_key(authorization))
        owners = [name for name, known in self.hashes.items() if hmac.compare_digest(known, given)]
        return owners[0] if owners else None


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _key(authorization: str) -> str:
    """The key in a header; empty where it has none."""
    scheme, _, rest = authorization.strip().partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
