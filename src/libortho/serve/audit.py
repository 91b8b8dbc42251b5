"""The audit log: one JSON object a line, of who was given which alpha.

A request above alpha 0 leaves a line *before* its first token is made, so that a crash cannot hide
it; if that line cannot be written, the request is refused. Every request that comes before the
policy leaves one when it is refused there, or when it ends. One of a wrong form (a parameter that
is not served, a value out of bounds, a body too long) does not come that far and leaves none. Texts
are never written unless the policy says `audit_text = true`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class AuditLog:
    """Appends to a file that only its owner can read (mode 0600); without a path, writes nothing.

    A line that could be written only in part is a failure, and the next one begins on a line of its
    own. Nothing is taken back, for other processes may write to the file, too.

    Attributes:
        failures: lines that could not be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.failures = 0
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._torn = False
        self.reopen()

    def reopen(self) -> None:
        """Open the file anew, as after log rotation; keeps the old one where that fails.

        Raises:
            OSError: it cannot be opened, is a link or no plain file, or cannot be made private.
        """
        if self.path is None:
            return
        # A link could have been put there to have something else appended to.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o600)
        try:
            torn = _prepare(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        with self._lock:
            old, self._descriptor = self._descriptor, descriptor
            self._torn = torn
        if old is not None:
            os.close(old)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def write(self, event: str, fields: dict[str, Any]) -> bool:
        """Append one line; False where that was not possible."""
        if self.path is None:
            return True
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record = {"time": stamp, "event": event, **fields}
        line = (json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n").encode()
        with self._lock:
            try:
                if self._descriptor is None:
                    raise OSError("the audit log is closed")
                # One write of an O_APPEND file: lines of several processes do not mix.
                whole = b"\n" + line if self._torn else line
                written = os.write(self._descriptor, whole)
                if written:
                    self._torn = written < len(whole)
                if written < len(whole):
                    raise OSError("the line was written in part")
            except OSError as error:
                self.failures += 1
                log.error("audit log %s: %s", self.path, error)
                return False
        return True


def _prepare(descriptor: int) -> bool:
    """Take a file that was there away from all but its owner; whether its last line has no end."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "expected a plain file")
    if found.st_mode & 0o077:
        os.fchmod(descriptor, 0o600)
    return found.st_size > 0 and os.pread(descriptor, 1, found.st_size - 1) != b"\n"
