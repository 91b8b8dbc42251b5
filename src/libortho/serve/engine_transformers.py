"""The embedded engine: transformers in this process, one running batch, an alpha per row.

A thread of its own owns the model. Between two tokens it lets waiting answers join the batch and
finished or cancelled ones leave (continuous batching), so a short answer never waits for a long
one. The event loop hands work over under a lock and gets pieces back by `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from libortho.data.tokens import Template, Tokens
from libortho.evaluation.generation import end_tokens
from libortho.serve.engine import (
    Answer,
    Finish,
    Generation,
    Piece,
    Scores,
    Scoring,
    Status,
    TokenLogprob,
)
from libortho.serve.errors import ApiError, alpha_not_served
from libortho.serve.limits import Limits
from libortho.serve.loading import Loaded
from libortho.serve.prompts import BoundedEncoder
from libortho.serve.rows import RunningRows, check_model, given_logprobs
from libortho.serve.sampling import Chosen, Rule, choose
from libortho.serve.text import TextStream

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_U = TypeVar("_U")

STOPPED = "the server is shutting down"


@dataclass(eq=False)
class _Row:
    """One answer: what is asked, and how far it has got. Owned by the engine's thread."""

    answer: _Answer
    ids: tuple[int, ...]
    alpha: float
    room: int
    rule: Rule
    text: TextStream
    made: int = 0
    last: int = 0
    ended: bool = False

    @property
    def most(self) -> int:
        """Columns that it may come to take."""
        return len(self.ids) + self.room


@dataclass(eq=False)
class _Job:
    """A scoring, how far it has got, and where its result goes.

    Attributes:
        found: log-probabilities at each alpha, as they come.
        steps: each runs the model once, within bounds.
    """

    tokens: Tokens
    found: dict[float, list[float]]
    future: asyncio.Future[dict[float, list[float]]] = field(repr=False)
    steps: Iterator[None] = field(init=False, repr=False)


class _Answer:
    """The event loop's end of an answer."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        self._over = False
        self.cancelled = False

    def put(self, item: Piece | ApiError) -> None:
        self._queue.put_nowait(item)

    def __aiter__(self) -> _Answer:
        return self

    async def __anext__(self) -> Piece:
        if self._over:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, ApiError):
            self._over = True
            raise item
        self._over = item.finish is not None
        return item

    async def aclose(self) -> None:
        # Read by the engine's thread before its next token; a plain flag needs no lock.
        self._over = self.cancelled = True


class TransformersEngine:
    """`Engine` over a loaded split.

    Attributes:
        mixed: whether rows of one batch may differ in alpha (see `check_model`).
    """

    def __init__(self, loaded: Loaded, limits: Limits, template: Template = "chat") -> None:
        """
        Raises:
            ValueError: the model keeps a state that is no plain KV cache.
        """
        self.digest = loaded.digest
        self._loaded, self._limits, self.template = loaded, limits, template
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._ends = frozenset(end_tokens(self._model, self._tokenizer))
        self._encoder = BoundedEncoder(self._model, self._tokenizer, limits, template)
        self.mixed = check_model(self._model, self._encoder.vocabulary)
        # Encoding a long text takes a while, so it is not done on the event loop; in one thread,
        # since a tokenizer is not made for several.
        self._aside = ThreadPoolExecutor(1, "libortho-tokenizer")
        self._arriving = 0
        self._wake = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._jobs: deque[_Job] = deque()
        self._stopping = False
        self._rows: list[_Row] = []
        self._batch = RunningRows(self._model)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- the event loop's side ------------------------------------------------------

    async def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="libortho-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Stop the thread after the token that it is at; answers still being made fail."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._aside.shutdown(wait=False)

    def status(self) -> Status:
        """How it is now."""
        ready = self._thread is not None and self._thread.is_alive() and not self._stopping
        ortho = self._loaded.ortho
        highest = 1.0 if ortho == "present" else 0.0
        waiting = len(self._waiting) + len(self._jobs) + self._arriving
        return Status(ready, ortho, highest, None, waiting, len(self._rows))

    async def submit(self, works: Sequence[Generation]) -> list[Answer]:
        """Take all of these, or none; see `Engine`."""
        self._check_open()
        for work in works:
            self._check_alpha(work.alpha)
        prompts = list(dict.fromkeys(work.prompt for work in works))
        for prompt in prompts:
            self._encoder.check_characters(prompt)
        with self._places(len(works)):
            encoded = await self._run_aside(self._encoder.prompts, prompts)
            rows = [self._row(work, encoded[work.prompt]) for work in works]
            with self._wake:
                self._check_open()
                self._waiting.extend(rows)
                self._wake.notify()
        return [row.answer for row in rows]

    async def score(self, work: Scoring) -> Scores:
        """Score a continuation at several alphas, one after the other."""
        self._check_open()
        for alpha in work.alphas:
            self._check_alpha(alpha)
        self._encoder.check_characters(work.prompt, work.completion)
        with self._places(1):
            head, tail, texts = await self._run_aside(self._encoder.scoring, work)
            assert self._loop is not None
            found: dict[float, list[float]] = {alpha: [] for alpha in work.alphas}
            job = _Job(Tokens((*head, *tail), len(head)), found, self._loop.create_future())
            job.steps = self._steps(job)
            with self._wake:
                self._check_open()
                self._jobs.append(job)
                self._wake.notify()
        logprobs = await job.future
        rows = tuple(tuple(logprobs[alpha]) for alpha in work.alphas)
        return Scores(texts, rows, len(head))

    @contextmanager
    def _places(self, count: int) -> Iterator[None]:
        """Places in the queue for what is being encoded: it need not be refused after that."""
        waiting = self.status().waiting
        if waiting + count > self._limits.queue:
            raise ApiError(
                429,
                "queue_full",
                f"{waiting} answers are waiting already; try again",
                retry_after=1,
            )
        self._arriving += count
        try:
            yield
        finally:
            self._arriving -= count

    async def _run_aside(self, function: Callable[[_T], _U], argument: _T) -> _U:
        """Run something that takes a while in the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, function, argument)

    def _check_open(self) -> None:
        if not self.status().ready:
            raise ApiError(503, "not_ready", STOPPED, retry_after=5)

    def _check_alpha(self, alpha: float) -> None:
        status = self.status()
        if not status.serves(alpha):
            raise alpha_not_served(alpha, status.served())

    def _row(self, work: Generation, ids: tuple[int, ...]) -> _Row:
        generator = torch.Generator()
        if work.seed is None:
            generator.seed()
        else:
            generator.manual_seed(work.seed)
        rule = Rule(work.temperature, work.top_p, generator, work.logprobs)
        text = TextStream(self._tokenizer, work.stop)
        room = self._encoder.room(len(ids), work.max_tokens)
        return _Row(_Answer(), ids, work.alpha, room, rule, text)

    def _text_of(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    # -- the thread's side ----------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._waiting or self._jobs or self._rows):
                    self._wake.wait()
                if self._stopping:
                    break
            try:
                self._turn()
            except Exception:
                # One bad batch must not end the server. What it was, the log says, not the client.
                log.exception("a batch failed")
                self._fail(ApiError(500, "engine_failed", "the engine failed on this batch"))
        self._fail(ApiError(503, "not_ready", STOPPED), waiting=True)

    def _turn(self) -> None:
        """One step of a scoring, if one waits; then one token for every row."""
        with self._wake:
            job = self._jobs[0] if self._jobs else None
        if job is not None and self._over(job):
            with self._wake:
                self._jobs.popleft()
        self._leave()
        joining = self._joining()
        if joining:
            # In the list before the model runs: whatever fails, they are told.
            self._rows += joining
            logits = self._batch.join([r.ids for r in joining], [r.alpha for r in joining])
            self._take(joining, logits)
            self._leave()
        if self._rows:
            # Also after a join: answers under way must not stand still while others arrive.
            logits = self._batch.step([row.last for row in self._rows])
            self._take(self._rows, logits)
            self._leave()

    def _joining(self) -> list[_Row]:
        """The waiting answers that fit into the batch, first come first served."""
        joining: list[_Row] = []
        longest = max((row.most for row in self._rows), default=0)
        with self._wake:
            # Those that nobody waits for any more must not fill the queue either.
            self._waiting = deque(r for r in self._waiting if not r.answer.cancelled)
            while self._waiting:
                row = self._waiting[0]
                count = len(self._rows) + len(joining) + 1
                longest = max(longest, row.most)
                if count > self._limits.rows or count * longest > self._limits.batch_tokens:
                    break
                here = {r.alpha for r in (*self._rows, *joining)}
                if not self.mixed and here and here != {row.alpha}:
                    break
                joining.append(self._waiting.popleft())
        return joining

    def _take(self, rows: Sequence[_Row], logits: torch.Tensor) -> None:
        """Choose each row's next token, and tell those who wait for it."""
        news = []
        for row, chosen in zip(rows, choose(logits, [row.rule for row in rows]), strict=True):
            piece = self._advance(row, chosen)
            if piece is not None:
                news.append((row.answer, piece))
        self._tell(news)

    def _advance(self, row: _Row, chosen: Chosen) -> Piece | None:
        row.last = chosen.token
        row.made += 1
        tokens: tuple[TokenLogprob, ...] = ()
        finish: Finish | None = None
        if chosen.token in self._ends:
            # The end of sequence is counted, as any token that was made, and never shown.
            finish, text = "stop", row.text.finish()
        else:
            if chosen.logprob is not None:
                top = tuple((self._text_of(i), value) for i, value in chosen.top)
                tokens = (TokenLogprob(self._text_of(chosen.token), chosen.logprob, top),)
            text = row.text.push(chosen.token)
            if not row.text.stopped and row.made >= row.room:
                finish, text = "length", text + row.text.finish()
            if row.text.stopped:
                finish = "stop"
        row.ended = finish is not None
        if not (text or tokens or finish):
            return None
        return Piece(text, tokens, finish, len(row.ids), row.made)

    def _leave(self) -> None:
        """Drop the rows that have ended or that nobody waits for."""
        stay = [i for i, r in enumerate(self._rows) if not (r.ended or r.answer.cancelled)]
        if len(stay) < len(self._rows):
            self._batch.keep(stay)
            self._rows = [self._rows[i] for i in stay]

    def _over(self, job: _Job) -> bool:
        """Take a step of a scoring; whether it was the last, or nobody waits for it any more."""
        if job.future.cancelled():
            return True
        try:
            for _ in job.steps:
                return False
        except Exception:
            log.exception("a scoring failed")
            self._call(_fail_future, job.future)
        else:
            self._call(_set_result, job.future, job.found)
        return True

    def _steps(self, job: _Job) -> Iterator[None]:
        for alpha, found in job.found.items():
            for part in given_logprobs(self._model, job.tokens, alpha):
                found += part
                yield

    def _fail(self, error: ApiError, waiting: bool = False) -> None:
        rows = list(self._rows)
        self._rows = []
        self._batch.clear()
        if waiting:
            with self._wake:
                rows += self._waiting
                self._waiting.clear()
                jobs = list(self._jobs)
                self._jobs.clear()
            for job in jobs:
                self._call(_fail_future, job.future)
        self._tell([(row.answer, error) for row in rows])

    def _tell(self, news: Sequence[tuple[_Answer, Piece | ApiError]]) -> None:
        if news:
            self._call(_put_all, news)

    def _call(self, function: Any, *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The event loop is closed: nobody waits any more.
            log.debug("an answer came after the event loop was closed")


def _put_all(news: Sequence[tuple[_Answer, Piece | ApiError]]) -> None:
    for answer, item in news:
        answer.put(item)


def _set_result(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail_future(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(ApiError(500, "engine_failed", "the engine failed on this scoring"))
