"""torch.compile: one graph for every alpha, no break, and alpha still per thread and per copy."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from libortho import BaseConfig, OrthoLinear, alpha_scope, replace_linear_layers, set_alpha
from libortho.base import quantize
from libortho.config import Storage
from libortho.ortho import LowRankOrtho, OrthoStream, SparseOrtho

ROWS, COLUMNS = 16, 24


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def layer_of(kind: str, storage: Storage = "int8") -> OrthoLinear:
    weight = torch.randn(ROWS, COLUMNS)
    ortho: OrthoStream
    if kind == "low_rank":
        left, right = torch.randn(ROWS, 2), torch.randn(2, COLUMNS)
        ortho = LowRankOrtho.from_factors(left, right, torch.float16)
    else:
        ortho = SparseOrtho.from_dense(weight, torch.rand(ROWS, COLUMNS) > 0.9, torch.float16)
    base = quantize(
        weight, BaseConfig(storage=storage, group_size=8 if storage == "int4" else None)
    )
    return OrthoLinear.from_streams(base, ortho, torch.randn(ROWS))


def compiled(module: nn.Module) -> nn.Module:
    # fullgraph=True raises at a graph break.
    result: nn.Module = torch.compile(module, backend="aot_eager", fullgraph=True)
    return result


@pytest.mark.parametrize("kind", ["low_rank", "sparse"])
@pytest.mark.parametrize("storage", ["int8", "int4", "fp16"])
def test_one_graph_for_every_alpha(kind: str, storage: Storage) -> None:
    layer = layer_of(kind, storage)
    fast, x = compiled(layer), torch.randn(4, 3, COLUMNS)
    for alpha in (0.0, 1.0, 0.3, [0.0, 1.0, 0.5, 0.2], [0.0, 1.0]):
        with alpha_scope(layer, alpha):
            torch.testing.assert_close(fast(x), layer(x), rtol=1e-5, atol=1e-5)
    for alpha in (0.7, 0.0):
        set_alpha(layer, alpha)
        torch.testing.assert_close(fast(x), layer(x), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_at_alpha_0_nothing_of_the_ortho_stream_comes_through() -> None:
    # Not even what a multiplication by 0 lets through.
    layer = layer_of("low_rank")
    assert isinstance(layer.ortho, LowRankOrtho)
    layer.ortho.left.fill_(float("inf"))
    x = torch.randn(2, COLUMNS)
    fast = compiled(layer)
    assert torch.equal(fast(x), layer(x))
    with alpha_scope(layer, [0.0, 1.0]):
        y = fast(x)
    assert torch.equal(y[0], layer(x)[0])
    assert not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("kind", ["low_rank", "sparse"])
def test_gradients_are_those_of_the_layer(kind: str) -> None:
    layer = layer_of(kind)
    found = []
    for run in (compiled(layer), layer):
        x = torch.linspace(-1, 1, 2 * COLUMNS).reshape(2, COLUMNS).requires_grad_()
        with alpha_scope(layer, [0.25, 1.0]):
            run(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_threads_have_their_own_alpha_in_one_graph() -> None:
    layer = layer_of("low_rank")
    fast, x = compiled(layer), torch.randn(5, COLUMNS)
    fast(x)
    barrier, wrong = threading.Barrier(3), []

    def work(alpha: float) -> None:
        with alpha_scope(layer, alpha):
            expected = layer(x)
            for _ in range(20):
                barrier.wait(60)
                if not torch.allclose(fast(x), expected, atol=1e-6):
                    wrong.append(alpha)

    threads = [threading.Thread(target=work, args=(a,)) for a in (0.0, 0.5, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_an_alpha_of_its_own(clone) -> None:
    layer = layer_of("low_rank")
    set_alpha(layer, 1.0)
    other = clone(layer)
    set_alpha(layer, 0.0)
    x = torch.randn(3, COLUMNS)
    with alpha_scope(layer, 1.0):
        full = layer(x)
    for run in (other, compiled(other)):
        torch.testing.assert_close(run(x), full)
    torch.testing.assert_close(compiled(layer)(x), layer(x))


def test_a_graph_that_outlived_its_layer_says_so() -> None:
    from libortho.alpha import add_scaled

    with pytest.raises(RuntimeError, match="split layer that is no more"):
        add_scaled(torch.ones(2, 2), torch.ones(2, 2), torch.tensor(-1))


def test_blocks_that_are_compiled_one_by_one_share_a_graph() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = layer_of("low_rank")

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).relu()

    blocks, x = [Block() for _ in range(12)], torch.randn(3, COLUMNS)
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for alpha in (0.0, 1.0):
        for block in blocks:
            with alpha_scope(block, alpha):
                torch.testing.assert_close(block(x), block.forward(x))
    assert counters["stats"]["unique_graphs"] == 1


def test_an_exported_graph_asks_the_layer_it_was_made_of() -> None:
    layer, x = layer_of("low_rank"), torch.randn(3, COLUMNS)
    run = torch.export.export(layer, (x,)).module()
    other = layer_of("low_rank")
    set_alpha(other, 1.0)  # whatever another layer is at
    for alpha in (0.0, 0.5):
        with alpha_scope(layer, alpha):
            torch.testing.assert_close(run(x), layer(x))


def test_keys_are_those_of_no_other_process() -> None:
    """A graph that was exported by one process may run in another, beside other layers."""
    keys = {int(layer_of("low_rank")._key) for _ in range(4)}
    assert len(keys) == 4
    assert min(keys) > 2**32  # no counter


def test_a_trace_would_freeze_alpha() -> None:
    layer, x = layer_of("low_rank"), torch.randn(3, COLUMNS)
    with pytest.raises(RuntimeError, match="trace"):
        torch.jit.trace(layer, (x,), check_trace=False)


def test_a_wrong_number_of_rows_is_the_same_error() -> None:
    layer = layer_of("low_rank")
    fast = compiled(layer)
    with pytest.raises(ValueError, match="multiple of that number"), alpha_scope(layer, [0.0, 1.0]):
        fast(torch.randn(3, COLUMNS))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_whole_models(families, large_ortho, name: str) -> None:
    family = families[name]
    model = family.build()
    replace_linear_layers(model, family.mlp, scale="absmax")
    large_ortho(model)
    fast, ids = compiled(model), torch.arange(3, 15).reshape(2, 6)

    def logits(run: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = run(input_ids=ids, use_cache=False).logits
        return result

    seen = []
    for alpha in (0.0, 1.0, [0.0, 1.0]):
        with alpha_scope(model, alpha):
            seen.append(logits(fast))
            torch.testing.assert_close(seen[-1], logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_the_csr_operator_keeps_the_rules_of_its_kind() -> None:
    # Schema, fake result, autograd: torch's own checks.
    ortho = layer_of("sparse").ortho
    assert isinstance(ortho, SparseOrtho)
    x = torch.randn(2, 3, COLUMNS, requires_grad=True)
    arguments = (x, ortho.crow, ortho.col, ortho.values, ROWS)
    torch.library.opcheck(torch.ops.libortho.csr_linear, arguments)
    torch.library.opcheck(
        torch.ops.libortho.csr_linear_backward,
        (torch.randn(2, 3, ROWS), ortho.crow, ortho.col, ortho.values, COLUMNS),
    )
    layer = layer_of("low_rank")
    torch.library.opcheck(torch.ops.libortho.alpha_factor, (torch.randn(4, ROWS), layer._key))
