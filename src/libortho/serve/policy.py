"""Who may have which alpha: the policy file, read strictly.

    version = 1
    without_key = "alpha-0"                # or "refuse": 401 for no key and for an unknown one
    without_key_requests_per_minute = 60   # for each client address
    audit_text = false                     # true: the audit log holds prompts and answers too

    [[keys]]
    id = "clinic"
    sha256 = "..."                         # `libortho keys new` prints it
    max_alpha = 1.0
    requests_per_minute = 120
    expires = 2030-01-01T00:00:00Z         # optional

An unknown setting is an error: a policy half understood could hand out a memory.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from libortho.errors import LibOrthoError
from libortho.files import alone_in, rewrite_text
from libortho.serve.keys import check_id, match

ANONYMOUS = "anonymous"

Rate = Annotated[int, Field(ge=1, le=10**9)]
"""Requests a minute; the most is beyond any server, and within what a float holds."""


class PolicyError(LibOrthoError, ValueError):
    """A policy file that cannot be followed."""


@dataclass(frozen=True)
class Principal:
    """On whose behalf a request is made.

    Attributes:
        id: the key's id, or "anonymous".
        max_alpha: the highest alpha it may ask for.
        requests_per_minute: its rate; None is without limit.
    """

    id: str
    max_alpha: float
    requests_per_minute: int | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class KeyRule(_Strict):
    """One key of the policy file.

    Attributes:
        sha256: the digest of the key, in lower case.
        requests_per_minute: None, which no file can say, is without limit.
    """

    id: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    max_alpha: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    requests_per_minute: Rate | None = 60
    expires: datetime | None = None

    @field_validator("id")
    @classmethod
    def _named(cls, value: str) -> str:
        if value == ANONYMOUS:
            raise ValueError(f"{ANONYMOUS!r} is what callers without a key are called")
        return check_id(value)

    @field_validator("expires")
    @classmethod
    def _zoned(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("expected a time zone, such as 2030-01-01T00:00:00Z")
        return value


class PolicyFile(_Strict):
    """The whole policy file."""

    version: Literal[1]
    without_key: Literal["alpha-0", "refuse"] = "alpha-0"
    without_key_requests_per_minute: Rate = 60
    audit_text: bool = False
    keys: list[KeyRule] = []


@dataclass(frozen=True)
class Policy:
    """What a server follows; replaced as a whole when its file is read again.

    Attributes:
        keys: the rules, in the file's order.
        anonymous: who a caller without a known key is; None refuses such callers.
        audit_text: whether the audit log may hold prompts and answers.
    """

    keys: tuple[KeyRule, ...] = ()
    anonymous: Principal | None = Principal(ANONYMOUS, 0.0, 60)
    audit_text: bool = False

    def principal(self, presented: str | None, now: datetime | None = None) -> Principal | None:
        """Who presents this key; None is to be refused (401).

        An expired key counts as unknown.
        """
        if presented:
            index = match(presented, [rule.sha256 for rule in self.keys])
            if index is not None:
                rule = self.keys[index]
                if rule.expires is None or (now or datetime.now(UTC)) < rule.expires:
                    return Principal(rule.id, rule.max_alpha, rule.requests_per_minute)
        return self.anonymous


def owner_policy(sha256: str) -> Policy:
    """The policy of `libortho ui`: any alpha and no rate for its one key, nothing for anybody else.

    "On this machine" is not enough: other accounts reach its ports, too.

    Args:
        sha256: the key's digest.
    """
    rule = KeyRule(id="owner", sha256=sha256, max_alpha=1.0, requests_per_minute=None)
    return Policy((rule,), anonymous=None)


def parse_policy(text: str) -> Policy:
    """A policy from the text of its file.

    Raises:
        PolicyError: not TOML, an unknown or missing setting, a bad value, or a key twice.
    """
    try:
        plain = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise PolicyError(f"not TOML ({error})") from None
    try:
        file = PolicyFile.model_validate(plain)
    except ValidationError as error:
        # The value itself stays out of the message: it may be a key pasted in the wrong place.
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PolicyError(f"{where}: {first['msg']}") from None
    for what in ("id", "sha256"):
        values = [getattr(rule, what) for rule in file.keys]
        for index, value in enumerate(values):
            if value in values[:index]:
                raise PolicyError(f"keys.{index}.{what}: {value[:12]!r} is there twice")
    anonymous = None
    if file.without_key == "alpha-0":
        anonymous = Principal(ANONYMOUS, 0.0, file.without_key_requests_per_minute)
    return Policy(tuple(file.keys), anonymous, file.audit_text)


def read_policy(path: Path) -> Policy:
    """A policy from its file.

    Raises:
        PolicyError: as `parse_policy`, naming the file.
        OSError: the file cannot be read.
    """
    try:
        return parse_policy(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise PolicyError(f"{path}: not UTF-8 text") from None
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from None


def append_entry(path: Path, entry: str) -> None:
    """Append a `[[keys]]` block to a policy file, made if missing; the result is checked first.

    The file keeps its mode and its owner, and a symlink to it stays one. Of several processes that
    append, one waits for the other.

    Raises:
        PolicyError: the file is not a policy, or would not be one with the entry.
        OSError: it cannot be read or written.
    """
    folder = Path(os.path.realpath(path)).parent
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        old = path.read_text(encoding="utf-8") if path.exists() else "version = 1\n"
        text = f"{old.rstrip()}\n\n{entry}"
        try:
            parse_policy(text)
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from None
        rewrite_text(path, text)
