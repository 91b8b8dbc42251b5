"""Peak memory of a stretch of work, as the operating system sees it."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL = 0.1
"""Seconds between two looks."""


class PeakMemory:
    """Within its block, watches how far the process's resident memory grows.

    Sampled from a thread of its own; a peak shorter than `INTERVAL` can be missed. Memory that the
    allocator held free before the block, and hands out again within it, is no growth. Host memory
    only: what is on a GPU is not seen.

    Attributes:
        growth: bytes; the largest resident set seen within the block, less that at its start.
    """

    growth: int = 0

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._start = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.growth = max(self.growth, self._process.memory_info().rss - self._start)
            if self._done.wait(INTERVAL):
                return
