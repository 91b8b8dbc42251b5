"""The key of an encrypted ortho stream: where it comes from, and which one is in use here.

A key is 32 random bytes, and the only thing of it that is ever shown is its id. It comes from a
file, from the environment, or from a command or function that asks a key management service for it.
Where none is given by an argument, the one in use is that of the environment, for reading and for
writing alike: with a key set, an ortho stream is written encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from libortho.checkpoint.names import PathLike

KEY_BYTES = 32
KEY_VARIABLE = "LIBORTHO_ORTHO_KEY"
FILE_VARIABLE = "LIBORTHO_ORTHO_KEY_FILE"
COMMAND_VARIABLE = "LIBORTHO_ORTHO_KEY_COMMAND"
_EXPECTED = {
    FILE_VARIABLE: "the path of a key file",
    KEY_VARIABLE: "64 hexadecimal digits",
    COMMAND_VARIABLE: "a command that prints 64 hexadecimal digits",
}
VARIABLES = tuple(_EXPECTED)


@dataclass(frozen=True)
class OrthoKey:
    """A key for ortho streams (AES-256).

    Attributes:
        secret: 32 random bytes; in no repr and no message.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.secret, bytes):
            raise TypeError(f"a key is a {type(self.secret).__name__}: expected bytes")
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a key of {len(self.secret)} bytes: expected {KEY_BYTES}")

    @property
    def id(self) -> str:
        """16 hexadecimal digits that name the key and do not tell it (an HMAC under it)."""
        return hmac.digest(self.secret, b"libortho ortho key id", hashlib.sha256)[:8].hex()

    @classmethod
    def from_file(cls, path: PathLike) -> OrthoKey:
        """From a text file of 64 hexadecimal digits (`openssl rand -hex 32`).

        Raises:
            ValueError: it holds anything else.
            OSError: it cannot be read.
        """
        with Path(path).open("rb") as file:
            return cls._parse(file.read(1024), f"the key file {os.fspath(path)}")

    @classmethod
    def from_hook(cls, hook: Callable[[], bytes]) -> OrthoKey:
        """From a function that returns the 32 bytes, such as a call to a key service."""
        return cls(hook())

    @classmethod
    def from_command(cls, command: str) -> OrthoKey:
        """From a command line that prints 64 hexadecimal digits; it is not run by a shell.

        Raises:
            ValueError: it fails, or prints anything else.
        """
        try:
            done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, check=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{COMMAND_VARIABLE}: cannot be run ({error})") from None
        if done.returncode:
            raise ValueError(f"{COMMAND_VARIABLE}: exited with status {done.returncode}")
        return cls._parse(done.stdout, f"what the command of {COMMAND_VARIABLE} prints")

    @classmethod
    def from_environment(cls) -> OrthoKey | None:
        """From the one of LIBORTHO_ORTHO_KEY_FILE, _KEY, _KEY_COMMAND that is set; else None.

        Raises:
            ValueError: more than one is set, one is empty, or what it leads to is no key.
            OSError: the file cannot be read.
        """
        given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        for name, value in given.items():
            # Somebody meant a key to be used; to go on without one would write the memory plain.
            if not value.strip():
                raise ValueError(
                    f"{name} is set and empty: expected {_EXPECTED[name]}, or no such variable"
                )
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are set: expected one of them")
        if FILE_VARIABLE in given:
            try:
                return cls.from_file(given[FILE_VARIABLE])
            except FileNotFoundError:
                path = given[FILE_VARIABLE]
                raise FileNotFoundError(f"{FILE_VARIABLE}: {path}: no such file") from None
        if KEY_VARIABLE in given:
            return cls._parse(os.fsencode(given[KEY_VARIABLE]), KEY_VARIABLE)
        return cls.from_command(given[COMMAND_VARIABLE]) if given else None

    @classmethod
    def _parse(cls, text: bytes, where: str) -> OrthoKey:
        stripped = text.strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{64}", stripped):
            # Never what it holds: that may be a key with a slip in it.
            raise ValueError(
                f"{where} is no key: expected 64 hexadecimal digits (openssl rand -hex 32), got "
                f"{len(stripped)} bytes that are not"
            )
        return cls(bytes.fromhex(stripped.decode()))


@dataclass(frozen=True)
class Access:
    """How ortho streams are read and written here.

    Attributes:
        find_key: asked for the key when one is needed; None is that there is none.
        base_only: ortho files are not looked at, and every ortho stream is None.
    """

    find_key: Callable[[], OrthoKey | None] = OrthoKey.from_environment
    base_only: bool = False


_DEFAULT = Access()
_ACCESS: ContextVar[Access] = ContextVar("libortho_ortho_access", default=_DEFAULT)


def current_access() -> Access:
    """What holds for this thread or task."""
    return _ACCESS.get()


@contextmanager
def ortho_access(
    key: OrthoKey | Callable[[], OrthoKey | None] | None = None, base_only: bool = False
) -> Iterator[None]:
    """Within the block, ortho streams are read and written with this key.

    For callers that cannot hand a key on, such as `AutoModelForCausalLM.from_pretrained`.

    Args:
        key: the key, or a function that is asked when one is needed; None leaves what holds.
        base_only: leave ortho files alone.

    Raises:
        TypeError: `key` is something else.
    """
    outer = current_access()
    if key is None:
        find = outer.find_key
    elif isinstance(key, OrthoKey):
        find = lambda: key  # noqa: E731
    elif callable(key):
        find = key
    else:
        raise TypeError(f"key is a {type(key).__name__}: expected an OrthoKey, a function or None")
    token = _ACCESS.set(Access(find, base_only or outer.base_only))
    try:
        yield
    finally:
        _ACCESS.reset(token)
