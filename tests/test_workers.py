"""Statistics by shards, and a real Ray cluster with a worker that is killed in the middle."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from libortho import (
    CurvatureConfig,
    GeometricConfig,
    SaliencyConfig,
    SeparationConfig,
    SpectralConfig,
    separate_,
)
from libortho.calibration import second_moments
from libortho.checkpoint import save_split
from libortho.data.tokens import Tokens, batches
from libortho.evaluation.finetuned import load_model
from libortho.gram import Gram
from libortho.integrations.ray import RayWorkers
from libortho.streaming import separate_streamed
from libortho.workers import (
    GATHERED_BYTES,
    Piece,
    ThisProcess,
    layer_groups,
    moments_apart,
    moments_bytes,
)

pytest.importorskip("transformers")

TARGETS = ("down_proj",)


class Backwards(ThisProcess):
    """Every piece by a copy of its arguments, as another process has it; the last one first."""

    def __init__(self, model: Path) -> None:
        self.model = str(model)

    def each(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Any]]:
        import pickle

        for name, piece in reversed(pieces.items()):
            assert piece.memory > 0
            function, arguments = pickle.loads(pickle.dumps((piece.function, piece.arguments)))
            yield name, pickle.loads(pickle.dumps(function(*arguments)))


@pytest.fixture
def model(tiny_llama, tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def text(random_tokens, count: int = 400) -> list[Tokens]:
    return random_tokens([40 + 7 * i % 60 for i in range(count)])


@pytest.mark.parametrize("weighted", [False, True])
def test_shards_add_up_to_the_whole(model: Path, random_tokens, weighted: bool) -> None:
    items = text(random_tokens)
    assert len(list(batches(items))) > 20
    weights = [torch.rand(i.targets) for i in items] if weighted else None
    loaded = load_model(str(model))
    layers = {n: m for n, m in loaded.named_modules() if n.endswith(TARGETS)}
    whole = second_moments(loaded, layers, items, weights=weights)
    seen: list[int] = []
    apart = moments_apart(Backwards(model), dict.fromkeys(layers, 64), items, weights, seen.append)
    assert sum(seen) == len(items)
    assert 8 < len(seen) <= 16
    for name, moments in whole.items():
        found = apart[name]
        assert (found.tokens, found.sequences) == pytest.approx((moments.tokens, moments.sequences))
        for one, other in ((found.body, moments.body), (found.first, moments.first)):
            one, other = one.dense(), other.dense()
            assert float((one - other).norm()) <= 1e-6 * float(other.norm())


def files(folder: Path) -> dict[str, bytes]:
    names = ("model.safetensors", "ortho.safetensors", "config.json", "ortho_config.json")
    return {name: (folder / name).read_bytes() for name in names}


def split(model: Path, out: Path, workers: Any, method: Any, items: list[Tokens]) -> None:
    loaded = load_model(str(model))
    config = SeparationConfig(method, target_modules=TARGETS, general_text=False)
    separate_(loaded, items[:3], items[3:], config, workers=workers)
    save_split(loaded, out)


PROJECTION = GeometricConfig(edit="projection", ortho_ratio=0.2, target_nll=5.0)


def test_neither_order_nor_process_changes_a_bit(
    model: Path, tmp_path: Path, random_tokens
) -> None:
    items = text(random_tokens, 60)

    class Apart(Backwards):
        def each(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Any]]:
            return ThisProcess().each(pieces)

    for label, workers in (("forwards", Apart(model)), ("backwards", Backwards(model))):
        split(model, tmp_path / label, workers, PROJECTION, items)
    assert files(tmp_path / "forwards") == files(tmp_path / "backwards")


def test_groups_of_layers() -> None:
    widths = {"a": 100, "b": 100, "c": 300, "d": 100, "e": 100}  # 80 kB each, "c" 720
    workers = Backwards(Path("model"))
    for size, expected in {
        1: ["a", "b", "c", "d", "e"],
        159_999: ["a", "b", "c", "d", "e"],
        160_000: ["ab", "c", "de"],
        880_000: ["abc", "de"],
        10**9: ["abcde"],
    }.items():
        workers.gathered_bytes = size
        assert ["".join(group) for group in layer_groups(workers, widths)] == expected, size
    assert layer_groups(ThisProcess(), widths) == [list(widths)]
    assert moments_bytes(100) == sum(part.nbytes for part in (Gram.of(torch.zeros(100, 100)),) * 2)


@pytest.mark.parametrize("method", ["descent", "projection"])
def test_groups_change_no_bit_and_bound_what_a_piece_returns(
    model: Path, tmp_path: Path, random_tokens, method: str
) -> None:
    items = text(random_tokens, 40)
    config = GeometricConfig(
        edit=method, ortho_ratio=0.2, target_nll=5.0, find_steps=1, fit_steps=2
    )
    width = 64  # of the tiny Llama's down_proj
    largest: dict[int, int] = {}

    class Measured(Backwards):
        def each(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Any]]:
            for name, found in super().each(pieces):
                if name.startswith("statistics"):
                    size = sum(m.body.nbytes + m.first.nbytes for m in found.values())
                    held = largest.get(self.gathered_bytes, 0)
                    largest[self.gathered_bytes] = max(held, size)
                yield name, found

    sizes = [1, moments_bytes(width), GATHERED_BYTES]
    for size in sizes:
        workers = Measured(model)
        workers.gathered_bytes = size
        split(model, tmp_path / str(size), workers, config, items)
        assert files(tmp_path / str(size)) == files(tmp_path / "1")
    assert 0 < largest[1] == largest[sizes[1]] <= moments_bytes(width)
    assert largest[GATHERED_BYTES] > largest[1]


@pytest.mark.parametrize("method", [SaliencyConfig(), CurvatureConfig()])
def test_methods_with_nothing_to_share(model: Path, tmp_path: Path, random_tokens, method) -> None:
    with pytest.raises(ValueError, match=r"nothing to hand to workers.* 'geometric', 'spectral'"):
        split(model, tmp_path / "out", ThisProcess(), method, text(random_tokens, 5))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[scale\]'"):
        RayWorkers("auto")


# -- a real cluster --------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster of two workers on this machine."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # No token, no dashboard, nothing sent anywhere; workers find what this process finds.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        # A worker cannot import this module, which pytest has loaded under a name of its own.
        ray.cloudpickle.register_pickle_by_value(sys.modules[dying_once.__module__])
        start(ray)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


def start(ray) -> None:
    """Skip where a busy machine does not start Ray in the 30 seconds that Ray itself allows."""
    for _ in range(3):
        try:
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                _memory=4 * 2**30,
                logging_level="error",
                log_to_driver=False,
            )
            return
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
    pytest.skip("three times Ray's own 30 seconds were not enough for it to start")


def dying_once(mark: Path, function: Any, arguments: tuple[Any, ...]) -> Any:
    """Kill the process that this runs in, the first time."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)


class Fatal:
    """Workers of which one is killed in the middle of the first set of pieces."""

    def __init__(self, workers: RayWorkers, mark: Path) -> None:
        self._workers, self._mark = workers, mark
        self.model, self.gathered_bytes = workers.model, workers.gathered_bytes
        self.calls = 0

    def each(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Any]]:
        self.calls += 1
        middle = list(pieces)[len(pieces) // 2]
        victim = pieces[middle]
        again = Piece(dying_once, (self._mark, victim.function, victim.arguments), victim.memory)
        yield from self._workers.each({**pieces, middle: again} if self.calls == 1 else pieces)
        assert self._mark.exists()


def test_a_killed_worker_changes_no_bit(
    cluster: str, model: Path, tmp_path: Path, random_tokens
) -> None:
    items = text(random_tokens, 40)
    how = SeparationConfig(SpectralConfig(ortho_ratio=0.05), target_modules=TARGETS)
    with RayWorkers(cluster, str(model)) as workers:
        fatal = Fatal(workers, tmp_path / "killed-in-statistics")
        split(model, tmp_path / "killed", fatal, PROJECTION, items)
        assert fatal.calls == 4  # statistics of two sets, factors, quantisation
        fatal = Fatal(workers, tmp_path / "killed-in-layers")
        separate_streamed(str(model), tmp_path / "streamed-killed", how, workers=fatal)
        with pytest.raises(ValueError, match=r"huge needs about 1024.00 GiB, and no machine"):
            list(workers.each({"huge": Piece(abs, (1,), 2**40)}))
        with pytest.raises(TypeError, match="bad operand"):
            list(workers.each({"wrong": Piece(abs, ("one",), 1)}))
    split(model, tmp_path / "alone", Backwards(model), PROJECTION, items)
    assert files(tmp_path / "killed") == files(tmp_path / "alone")
    separate_streamed(str(model), tmp_path / "streamed", how)
    assert files(tmp_path / "streamed-killed") == files(tmp_path / "streamed")
