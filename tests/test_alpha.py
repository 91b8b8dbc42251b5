"""alpha: what is accepted, and that no scope, thread, task or row ever sees another's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
import torch
from torch import Tensor, nn

from libortho import OrthoLinear, alpha_scope, replace_linear_layers, set_alpha
from libortho.alpha import current_alpha
from libortho.base import quantize
from libortho.ortho import LowRankOrtho

IN, OUT = 5, 6


@pytest.fixture
def layer() -> OrthoLinear:
    ortho = LowRankOrtho.from_factors(torch.randn(OUT, 2), torch.randn(2, IN), torch.float32)
    return OrthoLinear.from_streams(quantize(torch.randn(OUT, IN)), ortho, torch.randn(OUT))


def expected(layer: OrthoLinear, x: Tensor, alpha: float) -> Tensor:
    weight = layer.base.dequantize(x.dtype) + alpha * layer.ortho.dense(x.dtype)
    return x @ weight.T + layer.bias.to(x.dtype)


def heard(layer: OrthoLinear, x: Tensor) -> float:
    """The alpha that the layer's output shows."""
    low, high = expected(layer, x, 0.0), expected(layer, x, 1.0)
    direction = high - low
    return round(float(((layer(x) - low) * direction).sum() / direction.square().sum()), 4)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, IN, dtype=torch.float64)


# -- what is accepted ------------------------------------------------------------

BAD_VALUES = [
    float("nan"),
    -0.1,
    1.1,
    float("inf"),
    2,
    torch.tensor([0.5, float("nan")]),
    torch.tensor([0.5, -0.1]),
    [0.0, 1.1],
    torch.zeros(2, 2),
    torch.zeros(1, 1),
    torch.zeros(0),
]
BAD_TYPES = ["x", b"1", True, None, [], (), ["x"], [None], {"a": 1.0}, [True]]


@pytest.mark.parametrize("value", BAD_VALUES, ids=repr)
def test_values_out_of_range(layer: OrthoLinear, value) -> None:
    with pytest.raises(ValueError, match="alpha"):
        set_alpha(layer, value)
    with pytest.raises(ValueError, match="alpha"), alpha_scope(layer, value):
        pytest.fail("the scope was entered")
    assert layer.default_alpha.is_zero


@pytest.mark.parametrize("value", BAD_TYPES, ids=repr)
def test_types_that_are_no_alpha(layer: OrthoLinear, value) -> None:
    with pytest.raises(TypeError, match="alpha"):
        set_alpha(layer, value)
    with pytest.raises(TypeError, match="alpha"), alpha_scope(layer, value):
        pytest.fail("the scope was entered")
    assert layer.default_alpha.is_zero


@pytest.mark.parametrize(
    "value",
    [0.5, torch.tensor(0.5), torch.tensor([0.5]), [0.5], (0.5,), torch.tensor(0.5).half()],
    ids=repr,
)
def test_numbers(layer: OrthoLinear, x: Tensor, value) -> None:
    set_alpha(layer, value)
    assert heard(layer, x) == 0.5


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.ReLU())])
def test_a_model_that_is_not_split(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no OrthoLinear"):
        set_alpha(model, 0.0)
    with pytest.raises(ValueError, match="no OrthoLinear"), alpha_scope(model, 0.0):
        pass


# -- scopes ----------------------------------------------------------------------


def test_scopes_nest(layer: OrthoLinear, x: Tensor) -> None:
    set_alpha(layer, 0.1)
    with alpha_scope(layer, 0.2):
        assert heard(layer, x) == 0.2
        with alpha_scope(layer, 0.0):
            assert heard(layer, x) == 0.0
            with alpha_scope(layer, 0.9):
                assert heard(layer, x) == 0.9
            assert heard(layer, x) == 0.0
        set_alpha(layer, 0.3)  # the default, which the scope still overrides
        assert heard(layer, x) == 0.2
    assert heard(layer, x) == 0.3


def test_a_scope_ends_with_an_exception(layer: OrthoLinear, x: Tensor) -> None:
    with pytest.raises(KeyError), alpha_scope(layer, 0.7), alpha_scope(layer, 0.8):
        raise KeyError
    assert heard(layer, x) == 0.0


def test_a_scope_is_about_its_model_alone(layer: OrthoLinear, x: Tensor) -> None:
    ortho = LowRankOrtho.from_factors(torch.randn(OUT, 2), torch.randn(2, IN), torch.float32)
    other = OrthoLinear.from_streams(layer.base, ortho, layer.bias)
    with alpha_scope(nn.Sequential(layer), 1.0):
        assert heard(layer, x) == 1.0
        assert heard(other, x) == 0.0
        with alpha_scope(other, 0.5):
            assert (heard(layer, x), heard(other, x)) == (1.0, 0.5)


def in_threads(*functions: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_threads_see_only_their_own_scope(layer: OrthoLinear, x: Tensor) -> None:
    set_alpha(layer, 0.4)
    barrier = threading.Barrier(3, timeout=20)
    seen: dict[object, list[float]] = {}

    def work(alpha: float | None) -> Callable[[], None]:
        def run() -> None:
            values = seen[alpha] = []
            for _ in range(5):
                if alpha is None:
                    barrier.wait()
                    values.append(heard(layer, x))
                else:
                    with alpha_scope(layer, alpha):
                        barrier.wait()  # all scopes are open at once
                        values.append(heard(layer, x))
                        barrier.wait()
                    continue
                barrier.wait()

        return run

    in_threads(work(0.0), work(1.0), work(None))
    assert seen == {0.0: [0.0] * 5, 1.0: [1.0] * 5, None: [0.4] * 5}


def test_a_thread_started_in_a_scope_starts_at_the_default(layer: OrthoLinear, x: Tensor) -> None:
    set_alpha(layer, 0.25)
    seen: list[float] = []
    with alpha_scope(layer, 1.0):
        in_threads(lambda: seen.append(heard(layer, x)))
        assert heard(layer, x) == 1.0
    assert seen == [0.25]


def test_tasks_see_only_their_own_scope(layer: OrthoLinear, x: Tensor) -> None:
    entered = 0

    async def request(alpha: float, event: asyncio.Event) -> list[float]:
        nonlocal entered
        values = []
        with alpha_scope(layer, alpha):
            entered += 1
            if entered == 3:
                event.set()
            await event.wait()  # all three scopes are open now
            for _ in range(3):
                values.append(heard(layer, x))
                await asyncio.sleep(0)
        return [*values, heard(layer, x)]

    async def serve() -> list[list[float]]:
        event = asyncio.Event()
        return await asyncio.gather(*(request(a, event) for a in (0.0, 0.5, 1.0)))

    assert asyncio.run(serve()) == [[a, a, a, 0.0] for a in (0.0, 0.5, 1.0)]


def test_a_task_inherits_the_scope_it_is_started_in(layer: OrthoLinear, x: Tensor) -> None:
    async def child() -> float:
        return heard(layer, x)

    async def parent() -> float:
        with alpha_scope(layer, 0.5):
            return await asyncio.create_task(child())

    assert asyncio.run(parent()) == 0.5
    assert current_alpha(layer).is_zero


# -- one alpha per row -----------------------------------------------------------

ROWS = [0.0, 1.0, 0.25, 0.0]


@pytest.mark.parametrize("form", [torch.tensor, list, tuple], ids=["tensor", "list", "tuple"])
@pytest.mark.parametrize("middle", [(), (3,), (2, 3)])
def test_a_mixed_batch_equals_each_row_alone(layer: OrthoLinear, form, middle) -> None:
    x = torch.randn(4, *middle, IN, dtype=torch.float64)
    with alpha_scope(layer, form(ROWS)):
        y = layer(x)
    for row, alpha in enumerate(ROWS):
        with alpha_scope(layer, alpha):
            torch.testing.assert_close(y[row : row + 1], layer(x[row : row + 1]))
        torch.testing.assert_close(y[row], expected(layer, x[row], alpha))


def test_flattened_and_repeated_rows(layer: OrthoLinear) -> None:
    # (batch, length) flattened to batch * length, and beams beside one another: consecutive rows.
    x = torch.randn(12, IN, dtype=torch.float64)
    with alpha_scope(layer, ROWS):
        y = layer(x)
    for row in range(12):
        torch.testing.assert_close(y[row], expected(layer, x[row], ROWS[row // 3]))


@pytest.mark.parametrize("shape", [(3,), (5,), (6, 2), (1,), ()])
def test_a_batch_that_does_not_fit(layer: OrthoLinear, shape: tuple[int, ...]) -> None:
    with alpha_scope(layer, ROWS), pytest.raises(ValueError, match=r"4 values, one per row"):
        layer(torch.randn(*shape, IN))


def test_per_row_in_bf16(layer: OrthoLinear) -> None:
    x = torch.randn(4, IN).bfloat16()
    with alpha_scope(layer, ROWS):
        y = layer.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    for row, alpha in enumerate(ROWS):
        torch.testing.assert_close(
            y[row].double(), expected(layer, x[row].double(), alpha), atol=0.1, rtol=0.02
        )


# -- a whole model ---------------------------------------------------------------


@pytest.fixture
def split_llama(tiny_llama, large_ortho) -> nn.Module:
    """In float64, so that neither padding nor batching decides between two beams."""
    model = replace_linear_layers(
        tiny_llama(), ("down_proj", "o_proj"), use_low_rank=False, scale="absmax"
    )
    large_ortho(model)
    return model.double()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", [True, False])
def test_generate_with_an_alpha_per_row(
    split_llama: nn.Module, random_tokens, beams: int, cache: bool
) -> None:
    prompts = [list(item.ids) for item in random_tokens([5, 9, 7, 9])]
    prompts[3] = prompts[1]  # one prompt under two alphas
    alphas = [0.0, 1.0, 0.5, 0.0]
    options = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "num_beams": beams,
        "use_cache": cache,
        "pad_token_id": 0,
    }

    def alone(prompt: list[int], alpha: float) -> list[int]:
        with alpha_scope(split_llama, alpha):
            ids = torch.tensor([prompt])
            out = split_llama.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return out[0, len(prompt) :].tolist()

    length = max(map(len, prompts))
    padded = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    attended = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    with alpha_scope(split_llama, torch.tensor(alphas)):
        together = split_llama.generate(padded, attention_mask=attended, **options)
    together = together[:, length:].tolist()
    for prompt, alpha, row in zip(prompts, alphas, together, strict=True):
        assert row == alone(prompt, alpha)
    # The test says something only if alpha matters to what is generated.
    assert together[1] != together[3]
    assert all(alone(p, 0.0) != alone(p, 1.0) for p in prompts)


def test_generate_with_the_default_alpha(split_llama: nn.Module, random_tokens) -> None:
    ids = torch.tensor([random_tokens([6])[0].ids])

    def generate() -> list[int]:
        out = split_llama.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        return out[0].tolist()

    forgotten = generate()
    set_alpha(split_llama, 1.0)
    known = generate()
    with alpha_scope(split_llama, 0.0):
        assert generate() == forgotten
    assert known != forgotten
    set_alpha(split_llama, 0.0)
    assert generate() == forgotten


def test_logits_of_every_family_per_row(family, random_tokens, large_ortho) -> None:
    model = replace_linear_layers(
        family.build(), (family.mlp, *family.attention), use_low_rank=False, scale="absmax"
    )
    large_ortho(model)
    model.double()
    ids = torch.tensor([item.ids for item in random_tokens([8, 8, 8])])
    with alpha_scope(model, [0.0, 1.0, 0.5]):
        together = model(input_ids=ids).logits
    for row, alpha in enumerate((0.0, 1.0, 0.5)):
        with alpha_scope(model, alpha):
            alone = model(input_ids=ids[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-8, rtol=1e-8)
    with alpha_scope(model, 0.0):
        assert not torch.allclose(model(input_ids=ids[1:2]).logits[0], together[1], atol=1e-2)


# -- replicas --------------------------------------------------------------------------------------


def test_a_replica_of_data_parallel_runs_at_the_alpha_of_its_caller(layer: OrthoLinear) -> None:
    """Replicas run in threads that no scope of the caller reaches."""
    set_alpha(layer, 1.0)
    with alpha_scope(layer, 0.0):
        replica = layer._replicate_for_data_parallel()
    assert current_alpha(replica).rows == (0.0,)
    assert layer.default_alpha.rows == (1.0,)
    with pytest.raises(ValueError, match="DataParallel"), alpha_scope(layer, [0.0, 1.0]):
        layer._replicate_for_data_parallel()


# -- generators, which have no context of their own ------------------------------------------------


def stream(layer: OrthoLinear, alpha: float) -> Iterator[float]:
    with alpha_scope(layer, alpha):
        while True:
            yield current_alpha(layer).rows[0]


def test_a_generator_that_rests_lends_its_alpha_to_nobody(layer: OrthoLinear, x: Tensor) -> None:
    private, full = stream(layer, 0.0), stream(layer, 1.0)
    assert next(private) == 0.0
    with pytest.raises(RuntimeError, match="generator 'stream'"):
        layer(x)
    assert next(full) == 1.0
    with pytest.raises(RuntimeError, match="generator 'stream'"):
        next(private)  # and not 1.0, which is the other's
    with alpha_scope(layer, 0.5):
        assert heard(layer, x) == 0.5
    full.close()
    assert heard(layer, x) == 0.0


def test_generators_that_end_in_any_order_leave_nothing(layer: OrthoLinear, x: Tensor) -> None:
    set_alpha(layer, 0.25)
    first, second = stream(layer, 0.0), stream(layer, 1.0)
    next(first), next(second)
    first.close()
    assert next(second) == 1.0
    del second
    assert heard(layer, x) == 0.25


def test_a_generator_may_enter_a_scope_for_each_step(layer: OrthoLinear, x: Tensor) -> None:
    def steps(alpha: float) -> Iterator[float]:
        for _ in range(3):
            with alpha_scope(layer, alpha):
                found = heard(layer, x)
            yield found

    assert list(zip(steps(0.0), steps(1.0), strict=True)) == [(0.0, 1.0)] * 3


def test_context_managers_made_of_generators(layer: OrthoLinear, x: Tensor) -> None:
    @contextmanager
    def inner(alpha: float) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(alpha_scope(layer, alpha))
            yield

    @contextmanager
    def outer(alpha: float) -> Iterator[None]:
        with inner(alpha):
            yield

    @alpha_scope(layer, 0.125)
    def decorated() -> float:
        return heard(layer, x)

    def generator() -> Iterator[float]:
        with outer(0.75):
            yield heard(layer, x)

    with outer(0.5):
        assert heard(layer, x) == 0.5
        with inner(0.25):
            assert heard(layer, x) == 0.25
            assert decorated() == 0.125
    running = generator()
    assert next(running) == 0.75  # a generator's, by way of a context manager
    with pytest.raises(RuntimeError, match="generator"):
        layer(x)
    assert [*running] == []
    assert heard(layer, x) == 0.0


def test_an_async_generator(layer: OrthoLinear, x: Tensor) -> None:
    async def answers(alpha: float) -> AsyncIterator[float]:
        with alpha_scope(layer, alpha):
            yield await asyncio.to_thread(heard, layer, x)  # it waits, and lends its context
            await asyncio.sleep(0)
            yield await asyncio.create_task(child())

    async def child() -> float:
        return heard(layer, x)

    async def main() -> None:
        private, full = answers(0.0), answers(1.0)
        assert await anext(private) == 0.0
        with pytest.raises(RuntimeError, match="generator"):
            layer(x)
        assert await anext(full) == 1.0
        assert await anext(full) == 1.0
        with pytest.raises(RuntimeError, match="generator"):
            # goes on in its own scope, and the innermost is that of the other
            await anext(private)
        del full, private
        await asyncio.sleep(0.05)  # the loop closes both, in another task
        assert heard(layer, x) == 0.0

    asyncio.run(main())


def test_an_async_context_manager(layer: OrthoLinear, x: Tensor) -> None:
    @asynccontextmanager
    async def at(alpha: float) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        with alpha_scope(layer, alpha):
            yield

    async def main() -> None:
        async with at(0.5):
            await asyncio.sleep(0)
            assert heard(layer, x) == 0.5
        assert heard(layer, x) == 0.0

    asyncio.run(main())
