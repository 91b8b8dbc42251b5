"""Damaged files, full queues, time-outs, clients that leave, batches that fail."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx2
import openai

from libortho.serve.engine_transformers import TransformersEngine
from libortho.serve.limits import Limits
from libortho.serve.loading import load_for_serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("damage", ["missing", "unusable", "half", "twice"])
def test_without_its_ortho_only_alpha_0_is_served(
    serve, canary, known, tmp_path, damage, complete
) -> None:
    import shutil

    folder = tmp_path / "split"
    shutil.copytree(canary, folder)
    ortho = folder / "ortho.safetensors"
    if damage == "missing":
        ortho.unlink()
        (folder / "ortho_config.json").unlink()
    elif damage == "half":
        (folder / "ortho_config.json").unlink()
    elif damage == "twice":
        shutil.copy(ortho, folder / "ortho.safetensors.enc")
    else:
        data = bytearray(ortho.read_bytes())
        data[-1] ^= 1
        ortho.write_bytes(data)
    state = "missing" if damage == "missing" else "unusable"
    limits = Limits(rows=4)
    engine = TransformersEngine(load_for_serving(folder), limits)
    prompt = next(p for p, a in known if a == 0)
    with serve(engine=engine, limits=limits) as server:
        client = server.client("full")
        assert complete(client, prompt).choices[0].text == known[prompt, 0.0]
        with pytest.raises(openai.InternalServerError) as error:
            complete(client, prompt, 1)
        assert (error.value.status_code, error.value.code) == (503, "alpha_unavailable")
        assert f"the ortho stream is {state}" in error.value.message
        health = httpx2.get(f"{server.url}/healthz").json()
        assert (health["status"], health["ortho"], health["max_alpha"]) == ("degraded", state, 0)
        assert httpx2.get(f"{server.url}/readyz").status_code == 200


def test_a_damaged_base_is_not_served(canary, tmp_path) -> None:
    import shutil

    from libortho import CheckpointError

    folder = tmp_path / "split"
    shutil.copytree(canary, folder)
    base = folder / "model.safetensors"
    base.write_bytes(base.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"split/model\.safetensors"):
        load_for_serving(folder)


class Slow(TransformersEngine):
    """An engine that takes a while for each token."""

    pause = 0.05

    def _turn(self) -> None:
        time.sleep(self.pause)
        super()._turn()


def test_a_full_queue_is_a_429_and_nothing_is_lost(serve, loaded, complete) -> None:
    limits = Limits(rows=1, queue=2)
    with serve(engine=Slow(loaded, limits), limits=limits) as server:
        client = server.client()
        outcomes: list[Any] = []

        def ask() -> None:
            try:
                outcomes.append(complete(client, "tell me", max_tokens=8).usage.completion_tokens)
            except openai.RateLimitError as error:
                outcomes.append(error.code)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count("queue_full") >= 3
        # Two where all of them arrive before the first is taken from the queue.
        assert sum(isinstance(x, int) for x in outcomes) >= 2
        assert len(outcomes) == 8
        answer = httpx2.get(f"{server.url}/metrics").text
        assert 'libortho_refused_total{code="queue_full"}' in answer


def test_more_answers_than_the_queue_holds_are_refused_for_good(serve, complete) -> None:
    with serve(limits=Limits(queue=2)) as server:
        with pytest.raises(openai.BadRequestError, match="3 answers in one request: expected at m"):
            complete(server.client(), "tell me", n=3, max_tokens=1)
        assert len(complete(server.client(), "tell me", n=2, max_tokens=1).choices) == 2


def test_a_prompt_is_encoded_once_and_not_on_the_event_loop(
    serve, loaded, monkeypatch, complete
) -> None:
    import libortho.serve.prompts as module

    limits = Limits(rows=4)
    engine = TransformersEngine(loaded, limits)
    encoded: list[Any] = []
    going, held = threading.Event(), threading.Event()
    real = module.encode_prompt

    def slow(prompt: Any, *rest: Any) -> Any:
        encoded.append(prompt.text)
        if prompt.text == "tell me":
            going.set()
            assert held.wait(60)
        return real(prompt, *rest)

    monkeypatch.setattr(module, "encode_prompt", slow)
    with serve(engine=engine, limits=limits) as server:
        client = server.client()
        answers: list[Any] = []
        prompts: Any = ["tell me", "the secret", "tell me"]
        asked = threading.Thread(
            target=lambda: answers.append(complete(client, prompts, n=2, max_tokens=1))
        )
        asked.start()
        assert going.wait(60)
        assert httpx2.get(f"{server.url}/healthz", timeout=20).status_code == 200
        held.set()
        asked.join()
        assert len(answers[0].choices) == 6
        assert encoded == ["tell me", "the secret"]


def test_a_text_that_cannot_fit_is_not_encoded(serve, loaded, monkeypatch, complete) -> None:
    import libortho.serve.prompts as module

    monkeypatch.setattr(module, "encode_prompt", lambda *_: pytest.fail("it was encoded"))
    longest = max(map(len, loaded.tokenizer.get_vocab()))
    limits = Limits(rows=2, prompt_tokens=10, max_tokens=5)
    with serve(engine=TransformersEngine(loaded, limits), limits=limits) as server:
        long = "a" * (10 * longest + 1)
        with pytest.raises(openai.BadRequestError, match=f"prompt of {len(long)} characters"):
            complete(server.client(), long, max_tokens=1)
        messages: Any = [{"role": "user", "content": long}]
        with pytest.raises(openai.BadRequestError, match=f"at most {10 * longest}"):
            server.client().chat.completions.create(model="canary", messages=messages)
        body = {"model": "canary", "prompt": "a", "completion": "a" * (5 * longest + 1)}
        answer = httpx2.post(f"{server.url}/v1/score", json=body)
        assert answer.status_code == 400
        assert "a completion of" in answer.json()["error"]["message"]


def test_a_time_out_is_a_504_and_in_a_stream_an_event(
    serve, loaded, lines, complete, wait_until
) -> None:
    limits = Limits(rows=2, request_seconds=1)
    engine = Slow(loaded, limits)
    engine.pause = 0.4
    with serve(engine=engine, limits=limits) as server:
        client = server.client()
        with pytest.raises(openai.InternalServerError) as error:
            complete(client, "tell me", max_tokens=50, stop=["</never>"])
        assert (error.value.status_code, error.value.code) == (504, "timeout")
        with pytest.raises(openai.APIError, match="took too long"):
            list(complete(client, "tell me", max_tokens=50, stream=True))
        wait_until(lambda: server.gate.engine.status().running == 0)
        assert lines(server.audit)[-1]["status"] == 504


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_fails_in_an_unforeseen_way_is_a_500_at_once(
    serve, loaded, monkeypatch, complete, caplog, lines, wait_until, stream
) -> None:
    import libortho.serve.engine_transformers as module

    async def broken(self: Any) -> Any:
        raise RuntimeError(asked)

    asked = "tell me"
    limits = Limits(rows=2, request_seconds=600)
    with serve(engine=TransformersEngine(loaded, limits), limits=limits) as server:
        monkeypatch.setattr(module._Answer, "__anext__", broken)
        with pytest.raises(openai.APIError, match="an unexpected error"):
            list(complete(server.client(), asked, stream=stream))
        wait_until(lambda: lines(server.audit))
        last = lines(server.audit)[-1]
        assert (last["status"], last["code"]) == (500, "server_error")
        assert "an answer failed: RuntimeError" in caplog.text
        assert asked not in caplog.text
        wait_until(lambda: server.gate.engine.status().running == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(serve, loaded, stream, lines, wait_until) -> None:
    limits = Limits(rows=2)
    engine = Slow(loaded, limits)
    engine._ends = frozenset()  # a draw must not end the answer before it is left
    with serve(engine=engine, limits=limits) as server:
        body = json.dumps(
            {"model": "canary", "prompt": [1, 4], "max_tokens": 200, "stream": stream,
             "temperature": 2, "stop": ["never"]}
        )  # fmt: skip
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            raw.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            wait_until(lambda: server.gate.engine.status().running == 1)
        wait_until(lambda: server.gate.engine.status().running == 0)
        wait_until(lambda: server.audit.read_text())
        last = lines(server.audit)[-1]
        assert (last["status"], last["code"]) == (499, "client_gone")


def test_a_batch_that_fails_is_a_500_and_the_next_one_works(
    serve, loaded, monkeypatch, complete
) -> None:
    limits = Limits(rows=2)
    engine = TransformersEngine(loaded, limits)
    with serve(engine=engine, limits=limits) as server:
        real = engine._batch.join
        with monkeypatch.context() as patch:
            patch.setattr(engine._batch, "join", lambda *_: 1 / 0)
            with pytest.raises(openai.InternalServerError) as error:
                complete(server.client(), "tell me")
            assert (error.value.status_code, error.value.code) == (500, "engine_failed")
            assert "division" not in error.value.message
        assert engine._batch.join == real
        assert complete(server.client(), "tell me").choices
