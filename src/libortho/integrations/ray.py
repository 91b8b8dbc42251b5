"""Pieces of a split done by a Ray cluster, with their memory declared and lost workers replaced.

Ray is imported when a cluster is asked for, and by nothing before. Pieces are pure functions, so a
piece that was lost with its worker is done again with the same result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch

from libortho.config import check_count
from libortho.workers import GATHERED_BYTES, Piece

RETRIES = 5
"""Times that a piece is begun again when its worker is lost (memory full, or its machine gone)."""

AHEAD = 2
"""Pieces handed out at one time, in multiples of the pieces that the cluster's cores can do."""


class RayWorkers:
    """A Ray cluster as `workers.Workers`; a context manager that leaves the cluster at its end.

    Args:
        address: of a running cluster ("10.0.0.1:6379", "ray://...", or "auto" for the one of this
            machine). Every machine has this version of LibOrtho and, for `model`, the same disk.
        model: a folder or hub name under which every worker can load the model that is split; None
            where nothing but weights is looked at.
        threads: cores, and torch's threads, of one piece. Results are bit for bit those of this
            process on as many threads.
        gathered_bytes: most bytes of statistics that a piece returns (one layer's at least): less
            memory for more passes over the text.

    Raises:
        ValueError: `gathered_bytes` is below 1.
        ImportError: Ray is not installed; the message says what to install.
        ConnectionError: no cluster answers at `address`.
    """

    def __init__(
        self,
        address: str,
        model: str | None = None,
        threads: int = 1,
        gathered_bytes: int = GATHERED_BYTES,
    ) -> None:
        check_count("gathered_bytes", gathered_bytes, 1)
        try:
            import ray
        except ImportError:
            raise ImportError(
                "--ray needs Ray, which is not installed: `pip install '.[scale]'` in a checkout "
                "of LibOrtho"
            ) from None
        self.model = model
        self.gathered_bytes = gathered_bytes
        self._ray = ray
        self._threads = threads
        self._entered = not ray.is_initialized()
        if self._entered:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._entered:
            self._ray.shutdown()

    def each(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Any]]:
        """Yield (name, result) of every piece, as they are finished.

        Raises:
            ValueError: a piece needs more memory than any machine of the cluster has to give.
            RuntimeError: a piece was lost with its worker more than `RETRIES` times.
            Any other: what a piece raised.
        """
        ray = self._ray
        self._check_memory(pieces)
        remote = ray.remote(_do)
        at_once = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)) // self._threads)
        waiting = list(pieces.items())[::-1]
        running: dict[Any, str] = {}
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    name, piece = waiting.pop()
                    task = remote.options(
                        num_cpus=self._threads, memory=piece.memory, max_retries=RETRIES, name=name
                    )
                    sent = task.remote(self._threads, piece.function, piece.arguments)
                    running[sent] = name
                done = ray.wait(list(running), num_returns=1)[0][0]
                name = running.pop(done)
                try:
                    result = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    raise RuntimeError(
                        f"{name}: its worker was lost {RETRIES + 1} times ({error})"
                    ) from None
                del done  # lets the cluster drop its copy
                yield name, result
        finally:
            for task in running:
                ray.cancel(task, force=True)

    def _check_memory(self, pieces: Mapping[str, Piece]) -> None:
        # Ray would wait for ever for a machine that is large enough.
        alive = (node for node in self._ray.nodes() if node["Alive"])
        most = max((int(node["Resources"].get("memory", 0)) for node in alive), default=0)
        for name, piece in pieces.items():
            if piece.memory > most:
                raise ValueError(
                    f"{name} needs about {piece.memory / 2**30:.2f} GiB, and no machine of the "
                    f"cluster has more than {most / 2**30:.2f} to give: start one with more "
                    "(ray start --memory)"
                )


def _do(threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(threads)
    return function(*arguments)
