"""API keys: 256 random bits, of which only a digest is kept.

The digest is plain SHA-256, on purpose. Slow hashes (scrypt, argon2) protect secrets that people
choose and that can therefore be guessed; nobody guesses 256 random bits at any speed, and a slow
hash would let every stranger with a made-up key burn a tenth of a second of CPU per request.
So keys are only ever minted here, never chosen.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

PREFIX = "lo-"
LONGEST = 256
"""Characters of a presented key beyond which it is not even hashed."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class NewKey:
    """A key that was just made.

    Attributes:
        secret: what the caller sends; shown once, kept nowhere.
        sha256: what the policy file keeps, 64 hexadecimal digits.
    """

    secret: str
    sha256: str


def mint() -> NewKey:
    """A new key of 256 random bits."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return NewKey(secret, digest(secret))


def digest(secret: str) -> str:
    """What the policy file keeps of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def match(presented: str, digests: Sequence[str]) -> int | None:
    """Which of `digests` belongs to the presented key, or None.

    Takes the same time whichever one it is: every digest is compared, each in constant time.
    """
    if len(presented) > LONGEST:
        return None
    mine = digest(presented)
    found = None
    for index, other in enumerate(digests):
        if hmac.compare_digest(mine, other):
            found = index
    return found


def check_id(name: str) -> str:
    """The name under which a key appears in the audit log, checked.

    Raises:
        ValueError: not 1 to 64 letters, digits, dots, dashes or underscores.
    """
    if not _ID.fullmatch(name):
        raise ValueError(
            f"key id {name!r}: expected 1 to 64 letters, digits, '.', '_' or '-', the first a "
            "letter or digit"
        )
    return name


def toml_entry(
    name: str, key: NewKey, max_alpha: float, requests_per_minute: int, expires: str | None = None
) -> str:
    """The `[[keys]]` block of a policy file for a new key.

    Raises:
        ValueError: a bad id, alpha or rate; or `expires` is no time with its zone, or is past.
    """
    check_id(name)
    if not 0.0 <= max_alpha <= 1.0:
        raise ValueError(f"max_alpha={max_alpha!r}: expected a value in [0, 1]")
    if requests_per_minute < 1:
        raise ValueError(f"requests_per_minute={requests_per_minute!r}: expected at least 1")
    lines = [
        "[[keys]]",
        f'id = "{name}"',
        f'sha256 = "{key.sha256}"',
        f"max_alpha = {max_alpha!r}",
        f"requests_per_minute = {requests_per_minute}",
    ]
    if expires is not None:
        lines.append(f"expires = {_later(expires).isoformat()}")
    return "\n".join(lines) + "\n"


def _later(expires: str) -> datetime:
    try:
        found = datetime.fromisoformat(expires)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise ValueError(
            f"expires={expires!r}: expected a time and its zone, such as 2030-01-01T00:00:00Z"
        )
    if found <= datetime.now(UTC):
        raise ValueError(f"expires={expires!r} is past: expected a time when the key is to end")
    return found
