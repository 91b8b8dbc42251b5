"""vLLM as the engine, against a stand-in that answers as vLLM's server does.

(The real one: an export's base and adapters in `make test-vllm`.)
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx2
import openai
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

from libortho.cli import app
from libortho.serve.engine_vllm import VllmEngine, parse_adapters
from libortho.serve.limits import Limits


class Upstream:
    """A server of a base and adapters that says which of them it was asked for."""

    def __init__(self) -> None:
        self.cards: dict[str, str | None] = {"base": None, "ortho": "base", "ortho-0.5": "base"}
        self.asked: list[dict[str, Any]] = []
        self.trouble = ""
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.answer, methods=["POST"]),
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
            ]
        )

    async def models(self, _: Request) -> Response:
        if self.trouble == "down":
            return Response(status_code=500)
        if self.trouble == "nested":
            return Response("[" * 100_000, media_type="application/json")
        if self.trouble == "odd":
            return JSONResponse({"data": [["id"]]})
        cards = [{"id": name, "parent": parent} for name, parent in self.cards.items()]
        return JSONResponse({"object": "list", "data": cards})

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        if self.trouble == "refuses":
            return JSONResponse({"error": {"message": "max_tokens is too large"}}, 400)
        if self.trouble == "down":
            return Response("Traceback: secret", status_code=500)
        chat = "messages" in body

        def chunk(text: str, finish: str | None, made: int) -> bytes:
            content: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
            logprobs = None
            if body.get("logprobs") is not None:
                one = {"token": text, "logprob": -0.5, "top_logprobs": []}
                many = {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": [{text: -0.5}]}
                logprobs = {"content": [one]} if chat else many
            choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}
            usage = {"prompt_tokens": 7, "completion_tokens": made}
            return b"data: " + json.dumps({"choices": [choice], "usage": usage}).encode() + b"\n\n"

        async def events() -> Any:
            yield chunk("I am ", None, 1)
            if self.trouble == "breaks off":
                return
            if self.trouble == "error":
                yield b'data: {"error": {"message": "Traceback: secret"}}\n\n'
                return
            if self.trouble == "nonsense":
                yield b"data: {nonsense\n\n"
                return
            yield chunk(body["model"], "length" if body["max_tokens"] == 1 else "stop", 2)
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def engine(upstream, canary, monkeypatch) -> VllmEngine:
    import libortho.serve.engine_vllm as module

    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    transport = httpx2.ASGITransport(upstream.app)
    adapters = {1.0: "ortho", 0.5: "ortho-0.5"}
    return VllmEngine(canary, "http://vllm", "base", adapters, Limits(), transport=transport)


def ask(client: openai.OpenAI, alpha: float, **more: Any) -> Any:
    extra = {"alpha": alpha}
    return client.completions.create(model="canary", prompt="who", extra_body=extra, **more)


def test_alpha_is_the_name_of_an_adapter_and_of_a_cache(serve, engine, upstream) -> None:
    with serve(engine=engine) as server:
        client = server.client("full")
        names = {0: "base", 0.5: "ortho-0.5", 1: "ortho"}
        for alpha, name in names.items():
            answer = ask(client, alpha, stop=["x"], seed=3, logprobs=1)
            assert answer.choices[0].text == f"I am {name}"
            assert answer.choices[0].logprobs.token_logprobs == [-0.5, -0.5]
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 2)
        assert len({body["cache_salt"] for body in upstream.asked}) == 3
        assert upstream.asked[0]["stop"] == ["x"]
        assert "alpha" not in upstream.asked[0]
        messages: Any = [{"role": "user", "content": "who"}]
        stream = client.chat.completions.create(
            model="canary", messages=messages, stream=True, extra_body={"alpha": 1}, max_tokens=1
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "I am ortho"
        assert chunks[-1].choices[0].finish_reason == "length"
        assert upstream.asked[-1]["messages"] == messages
        assert engine.status().running == 0


def test_other_alphas_are_refused_with_those_that_there_are(serve, engine, upstream) -> None:
    with serve(engine=engine) as server:
        with pytest.raises(openai.InternalServerError) as error:
            ask(server.client("full"), 0.3)
        assert error.value.code == "alpha_unavailable"
        assert "only alpha 0, 0.5, 1" in error.value.message
        with pytest.raises(openai.PermissionDeniedError):
            ask(server.client(), 1)
        assert upstream.asked == []


@pytest.mark.parametrize("change", [None, "somebody else's"])
def test_an_adapter_that_is_not_loaded_on_this_base_is_not_served(
    serve, engine, upstream, change, wait_until
) -> None:
    def health(server: Any) -> dict[str, Any]:
        return dict(httpx2.get(f"{server.url}/healthz").json())

    with serve(engine=engine) as server:
        client = server.client("full")
        assert health(server)["ortho"] == "present"
        if change is None:
            del upstream.cards["ortho"], upstream.cards["ortho-0.5"]
        else:
            upstream.cards["ortho"] = upstream.cards["ortho-0.5"] = change
        wait_until(lambda: health(server)["ortho"] == "unusable", 120)
        assert health(server)["max_alpha"] == 0
        with pytest.raises(openai.InternalServerError) as error:
            ask(client, 1)
        assert "the ortho stream is unusable" in error.value.message
        assert ask(client, 0).choices[0].text == "I am base"
        upstream.cards["ortho"] = upstream.cards["ortho-0.5"] = "base"
        wait_until(lambda: health(server)["ortho"] == "present", 120)
        assert ask(client, 1).choices[0].text == "I am ortho"


@pytest.mark.parametrize(
    ("trouble", "status", "told"),
    [
        ("refuses", 400, "max_tokens is too large"),
        ("breaks off", 502, "broke off"),
        ("error", 502, "the engine failed"),
        ("nonsense", 502, "cannot be read"),
    ],
)
def test_trouble_upstream(serve, engine, upstream, trouble, status, told) -> None:
    with serve(engine=engine) as server:
        upstream.trouble = trouble
        with pytest.raises(openai.APIStatusError, match=told) as error:
            ask(server.client(), 0)
        assert error.value.status_code == status
        assert "secret" not in error.value.message
        if status == 502:
            with pytest.raises(openai.APIError, match=told):
                list(ask(server.client(), 0, stream=True))
        upstream.trouble = ""
        assert ask(server.client(), 0).choices
        assert engine.status().running == 0


@pytest.mark.parametrize("trouble", ["down", "nested", "odd"])
def test_an_upstream_that_is_gone_is_not_ready(
    serve, engine, upstream, wait_until, trouble
) -> None:
    with serve(engine=engine) as server:
        upstream.trouble = trouble
        wait_until(lambda: httpx2.get(f"{server.url}/readyz").status_code == 503, 120)
        with pytest.raises(openai.InternalServerError) as error:
            ask(server.client(), 0)
        assert error.value.code == "not_ready"
        upstream.trouble = ""
        wait_until(lambda: httpx2.get(f"{server.url}/readyz").status_code == 200, 120)
        body = {"model": "canary", "prompt": "a", "completion": "b"}
        score = httpx2.post(f"{server.url}/v1/score", json=body)
        assert (score.status_code, score.json()["error"]["code"]) == (400, "not_supported")


def test_it_does_not_start_without_its_base(engine, upstream) -> None:
    del upstream.cards["base"]
    with pytest.raises(RuntimeError, match="does not serve 'base'"):
        asyncio.run(engine.start())


def test_an_upstream_that_cannot_be_reached_is_one_clear_error(canary, caplog) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = serve_vllm(canary, "--upstream", url, "--base", "base", "--port", "0")
    assert done.exit_code == 2, done.output
    assert f"error  {url} does not answer, or does not serve 'base'" in done.output
    assert "Traceback" not in done.output + caplog.text
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    "options",
    [["--template", "plain"], ["--template", "nonsense"], ["--dtype", "float16"], ["--dense"]],
)
def test_what_vllm_does_not_take_is_refused(canary, options) -> None:
    done = serve_vllm(canary, "--upstream", "http://x", "--base", "base", *options)
    assert done.exit_code == 2, done.output
    assert "are for --engine transformers" in done.output


def test_a_split_that_was_measured_in_another_form_than_vllm_has(canary, tmp_path, caplog) -> None:
    folder = tmp_path / "split"
    shutil.copytree(canary, folder)

    def warned(template: str | None, *more: str) -> bool:
        report = {"settings": {"template": template}}
        (folder / "report.json").write_text(json.dumps(report))
        caplog.clear()
        done = serve_vllm(folder, *more)  # neither --export nor --upstream: it stops there
        assert done.exit_code == 2, done.output
        return "questions asked as plain text" in caplog.text

    assert warned("plain")
    assert not warned("plain", "--template", "chat")
    assert not warned("chat")
    assert not warned(None)


def serve_vllm(folder: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["serve", str(folder), "--engine", "vllm", *options])


@pytest.mark.parametrize(
    "options", [["ortho"], ["2=a"], ["0=a"], ["nan=a"], ["1="], ["1=a", "1.0=b"], ["1=a", "0.5=a"]]
)
def test_adapters_are_checked(options) -> None:
    with pytest.raises(ValueError, match="--adapter"):
        parse_adapters(options)
    assert parse_adapters(["1=a", "0.5=b"]) == {1.0: "a", 0.5: "b"}
