"""What the benchmarks share: interleaved rounds, medians, and the list of bars that they keep.

Nothing that is compared is timed apart: a round times every variant once, and a ratio is the median
of the rounds' own ratios, so that a machine that slows down slows both sides of it.

Where it can be (glibc), memory that is freed is kept for the next call, for all variants alike, and
some rounds are not counted. Else a result of some hundred kilobytes goes back to the system now and
then and is cleared by it for the next one, which costs a quarter of a call, at random.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

BARS = Path(__file__).parent / "results" / "bars.json"
FINER = 4
"""How many times as many rounds `Rounds` may make."""


@dataclass(frozen=True)
class Bar:
    """One requirement.

    Attributes:
        bar: what is measured, with "at least" or "at most" before `required`.
        value, required: of one unit, usually a ratio.
        holds: whether value meets required.
    """

    bar: str
    value: float
    required: float
    holds: bool


def at_least(what: str, value: float, required: float) -> Bar:
    return Bar(f"{what}: at least", round(value, 4), required, value >= required)


def at_most(what: str, value: float, required: float) -> Bar:
    return Bar(f"{what}: at most", round(value, 4), required, value <= required)


def keep_memory() -> None:
    """See the module's text; nothing happens without glibc."""
    trim_threshold, mmap_threshold, most = -1, -3, 32 * 2**20
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(mmap_threshold, most)  # no more is allowed
        library.mallopt(trim_threshold, 2**30)


class Rounds:
    """Seconds of each variant, round by round.

    The shorter a round, the more alike is what the machine does in it. So where all calls are short
    there are up to four times as many rounds, each a quarter as long. Each has an order of its own:
    what ran before leaves its marks on what runs next.

    Args:
        variants: name -> function of a running number; it does the work once.
        rounds: how many at least.
        seconds: about how long a variant is timed in so many rounds, divided by them; 0 for one
            call a round.
    """

    def __init__(
        self, variants: Mapping[str, Callable[[int], object]], rounds: int, seconds: float
    ) -> None:
        keep_memory()
        counts = dict.fromkeys(variants, 0)

        def call(name: str, times: int) -> float:
            function, first = variants[name], counts[name]
            start = time.perf_counter()
            for number in range(first, first + times):
                function(number)
            counts[name] += times
            return (time.perf_counter() - start) / times

        for name in variants:
            call(name, 1)
        calls = dict.fromkeys(variants, 1)
        if seconds > 0:
            once = {name: call(name, 1) for name in variants}
            slowest = max(*once.values(), seconds / FINER)
            rounds = min(FINER * rounds, max(rounds, round(rounds * seconds / slowest)))
            calls = {name: max(1, round(seconds / FINER / t)) for name, t in once.items()}
        self.times: dict[str, list[float]] = {name: [] for name in variants}
        names, draw = list(variants), random.Random(0)
        uncounted = rounds // 3 if seconds > 0 else 0  # a long call needs none
        for turn in range(-uncounted, rounds):
            draw.shuffle(names)
            for name in names:
                seconds_each = call(name, calls[name])
                if turn >= 0:
                    self.times[name].append(seconds_each)

    def median(self, name: str) -> float:
        """Seconds a call."""
        return statistics.median(self.times[name])

    def ratio(self, above: str, below: str) -> float:
        """Median over rounds of time(above) / time(below)."""
        pairs = zip(self.times[above], self.times[below], strict=True)
        return statistics.median(a / b for a, b in pairs)


def keep(source: str, bars: list[Bar], path: Path) -> bool:
    """Print the bars, put them into the list at `path` in place of `source`'s; True if all hold."""
    table = Table(title=f"bars of {source}", title_justify="left")
    for heading in ("bar", "value", "required", "holds"):
        table.add_column(heading, justify="left" if heading == "bar" else "right")
    for bar in bars:
        style = None if bar.holds else "red"
        table.add_row(bar.bar, f"{bar.value:.3f}", f"{bar.required:g}", str(bar.holds), style=style)
    Console(width=110).print(table)
    known = json.loads(path.read_text()) if path.exists() else []
    others = [bar for bar in known if not bar["bar"].startswith(f"{source}: ")]
    mine = [asdict(bar) | {"bar": f"{source}: {bar.bar}"} for bar in bars]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(others + mine, indent=1) + "\n")
    return all(bar.holds for bar in bars)
