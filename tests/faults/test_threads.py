"""Many threads at different alphas on one model; many calls without more memory."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable

import pytest
import torch

import libortho
from libortho import alpha_scope

IDS = torch.tensor([[1, 5, 9, 3, 17, 22]])


@pytest.fixture
def model(tiny_llama, large_ortho) -> torch.nn.Module:
    made = libortho.replace_linear_layers(tiny_llama())
    large_ortho(made)
    return made


@torch.no_grad()
def test_64_threads_at_64_alphas(model, times: Callable[[str, int], int]) -> None:
    def run(alpha: float) -> torch.Tensor:
        with alpha_scope(model, alpha):
            return model(IDS).logits

    alphas = [i / 63 for i in range(64)]
    alone = [run(alpha) for alpha in alphas]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(alone))
    start = threading.Barrier(len(alphas), timeout=60)
    end = [0.0]
    wrong: list[str] = []
    counts = [0] * len(alphas)

    @torch.no_grad()
    def work(index: int) -> None:
        start.wait()
        while counts[index] < 3 or time.monotonic() < end[0]:
            if not torch.equal(run(alphas[index]), alone[index]):
                wrong.append(f"alpha {alphas[index]}")
            counts[index] += 1

    end[0] = time.monotonic() + times("THREAD_SECONDS", 1)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(alphas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    print(f"\n{sum(counts)} calls in 64 threads, {len(wrong)} differ")
    assert wrong == []
    assert min(counts) >= 3


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux's /proc")
def test_generate_does_not_grow(model, times: Callable[[str, int], int]) -> None:
    mask = torch.ones_like(IDS)

    def calls(count: int) -> None:
        for index in range(count):
            with alpha_scope(model, index % 3 / 2):
                model.generate(IDS, attention_mask=mask, max_new_tokens=3, do_sample=False)

    calls(20)  # what is made once
    gc.collect()
    objects, before = len(gc.get_objects()), resident()
    count = times("SOAK", 60)
    calls(count)
    gc.collect()
    more, grown = len(gc.get_objects()) - objects, resident() - before
    print(f"\n{count} calls: {more} objects and {grown / 2**20:.1f} MiB more")
    assert more < 200
    assert grown < 16 * 2**20
