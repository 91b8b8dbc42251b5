"""SIGKILL at random instants of saving: afterwards the old checkpoint or the new one, whole."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import libortho
from libortho.checkpoint import save_split, verify_split

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="folders change place as on Linux")


def save_for_ever(models, target: Path, ready) -> None:
    ready.set()
    while True:
        for model in models:
            save_split(model, target)


def test_sigkill_while_saving(
    tiny_llama, large_ortho, times: Callable[[str, int], int], tmp_path: Path
) -> None:
    # Splits of other layers: any mixture of the two would fail its digests.
    models = [
        libortho.replace_linear_layers(tiny_llama(), target_modules=name)
        for name in ("down_proj", "up_proj")
    ]
    known: dict[str, int] = {}
    target = tmp_path / "work" / "split"
    for number, model in enumerate(models):
        large_ortho(model)
        start = time.perf_counter()
        save_split(model, target)
        seconds = time.perf_counter() - start
        known[verify_split(target).manifest.base_sha256] = number
    # A fork has the models and all imports: a kill costs milliseconds.
    fork = multiprocessing.get_context("fork")
    draw = random.Random(0)
    found: Counter[int] = Counter()
    for _ in range(times("KILLS", 10)):
        ready = fork.Event()
        writer = fork.Process(target=save_for_ever, args=(models, target, ready))
        writer.start()
        assert ready.wait(60)
        time.sleep(draw.uniform(0, 4 * seconds))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        found[known[verify_split(target).manifest.base_sha256]] += 1
        unfinished = [p for p in target.parent.iterdir() if p != target]
        assert all(p.name.startswith(".split.partial-") for p in unfinished)
    print(f"\n{found.total()} kills, then {dict(found)} of one split and of the other")
    save_split(models[0], target)
    assert known[verify_split(target).manifest.base_sha256] == 0
