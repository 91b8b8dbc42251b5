"""What answers a request: the protocol that both engines follow, and what passes through it.

An engine knows nothing of keys: it is handed an alpha that was granted. It says which alphas it can
serve at the moment, and refuses any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from libortho.data.tokens import Template
from libortho.errors import LibOrthoError

Finish = Literal["stop", "length"]


class EngineUnavailable(LibOrthoError, RuntimeError):
    """An engine that does not come up; the message says what is amiss."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an answer follows; exactly one of the three is given.

    Attributes:
        text: plain text.
        messages: a conversation, which the model's template turns into text.
        ids: token ids.
    """

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer to be made.

    Attributes:
        prompt: what it follows.
        alpha: granted, in [0, 1].
        max_tokens: at most so many new tokens; None is as many as the server gives by default.
        temperature: 0 is greedy.
        top_p: nucleus, in (0, 1].
        seed: of the sampling; None draws one.
        stop: strings before which the answer ends.
        logprobs: None for none, else so many alternatives beside each token's own.
    """

    prompt: Prompt
    alpha: float
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and how likely it was, in nats, before temperature; and the likeliest ones there."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of an answer.

    Attributes:
        text: new text, maybe empty.
        tokens: the new tokens with their log-probabilities, where these were asked for.
        finish: why the answer ended, in its last piece.
        prompt_tokens, completion_tokens: so far.
    """

    text: str
    tokens: tuple[TokenLogprob, ...]
    finish: Finish | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Scoring:
    """A given continuation, to be scored at several alphas.

    Attributes:
        prompt: what it follows.
        completion: the text that is scored.
        alphas: granted, each in [0, 1].
    """

    prompt: Prompt
    completion: str
    alphas: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of one continuation.

    Attributes:
        tokens: its tokens as text, which join to the whole; one that ends within a character is
            empty, and the next one has all of it.
        logprobs: for each alpha asked for, the log-probability of each token, nats.
        prompt_tokens: tokens of the prompt.
    """

    tokens: tuple[str, ...]
    logprobs: tuple[tuple[float, ...], ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Status:
    """How an engine is.

    Attributes:
        ready: it takes requests.
        ortho: "present", "missing" or "unusable" (damaged, of another base, not readable, or its
            adapter not loaded), or "locked" (encrypted, and there is no key).
        max_alpha: the highest alpha that can be served now; 0 unless ortho is present.
        levels: the only alphas that can be served, where they are few; None is all up to the
            highest.
        waiting, running: answers in the queue, and being made.
    """

    ready: bool
    ortho: Literal["present", "missing", "unusable", "locked"]
    max_alpha: float
    levels: tuple[float, ...] | None = None
    waiting: int = 0
    running: int = 0

    def serves(self, alpha: float) -> bool:
        """Whether this alpha can be had."""
        if self.levels is not None:
            return alpha in self.levels
        return alpha <= self.max_alpha

    def served(self) -> str:
        """What can be had, in words."""
        if self.levels is not None and len(self.levels) > 1:
            return "only alpha " + ", ".join(f"{level:g}" for level in self.levels)
        if self.max_alpha == 0:
            return f"the ortho stream is {self.ortho}, only alpha 0 is"
        return f"alpha goes up to {self.max_alpha:g}"


class Answer(Protocol):
    """An answer that is being made; ends after the piece that has `finish`."""

    def __aiter__(self) -> Answer: ...

    async def __anext__(self) -> Piece: ...

    async def aclose(self) -> None:
        """Stop making it; harmless when it has ended."""


class Engine(Protocol):
    """What makes answers. All methods are called from the server's event loop."""

    digest: str
    """What identifies the model: SHA-256 of its base stream, or of what stands for it."""

    template: Template
    """How it turns messages into a prompt."""

    async def start(self) -> None:
        """Get ready.

        Raises:
            EngineUnavailable: it cannot, for a reason that whoever runs it can mend.
        """

    async def stop(self) -> None:
        """Release everything; answers still being made fail."""

    def status(self) -> Status:
        """How it is now; cheap."""

    async def submit(self, works: Sequence[Generation]) -> list[Answer]:
        """Take all of these, or none.

        Raises:
            ApiError: a prompt that cannot be served (400), an alpha that cannot (503), a full
                queue (429).
        """

    async def score(self, work: Scoring) -> Scores:
        """Score a continuation at several alphas.

        Raises:
            ApiError: as `submit`; 400 where the engine cannot score at all.
        """
