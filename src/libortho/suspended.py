"""Whether a `with` block stands in a generator, and that generator rests at a `yield`.

A generator has no context of its own: what it sets in a `ContextVar` is seen by whoever iterates
it, and by every other generator that runs before it ends. What such a block set must not be taken
for the caller's.
"""

from __future__ import annotations

import dis
import inspect
import sys
from dataclasses import dataclass
from types import FrameType

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_RESUME = dis.opmap["RESUME"]
_AFTER_AWAIT = 3
"""Low bits of the argument of `RESUME`, which follows each point where a generator may rest."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A generator in which a block was entered.

    Attributes:
        frame: of the generator.
    """

    frame: FrameType

    @property
    def name(self) -> str:
        return self.frame.f_code.co_qualname

    def rests(self) -> bool:
        """True while the generator has yielded; false while it runs, or awaits what it began."""
        return self.frame.f_back is None and not _awaits(self.frame)


def owner() -> Owner | None:
    """The generator that the calling context manager is entered in; None where it is none.

    A generator made a context manager by `contextlib` counts as part of the code that enters it:
    such blocks end in the order in which they began.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (_of_contextlib(frame) or _of_contextlib(frame.f_back)):
        if not _of_contextlib(frame) and not frame.f_code.co_flags & _GENERATOR:
            break  # a function that a decorator of contextlib calls
        frame = frame.f_back
    if frame is None or not frame.f_code.co_flags & _GENERATOR:
        return None
    return Owner(frame)


def _of_contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") == "contextlib"


def _awaits(frame: FrameType) -> bool:
    """Whether an async generator that does not run waits for something, and has not yielded."""
    code, last = frame.f_code, frame.f_lasti
    if not code.co_flags & inspect.CO_ASYNC_GENERATOR:
        return False
    # `last` is the yield itself or, by version and specialisation, the `RESUME` behind it.
    points = [code.co_code[at : at + 2] for at in (last, last + 2)]
    return any(point[0] == _RESUME and point[1] & 3 == _AFTER_AWAIT for point in points if point)
