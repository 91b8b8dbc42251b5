"""vLLM as the engine, against a stand-in that answers as vLLM's server does.

(The real one: an export's base and adapters in `make test-vllm`.)
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from libortho.serve.vllm_guard import RequireKey
from libortho.serve.vllm_process import find_adapters, program, serve_command, vllm_server


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
    serve, engine, upstream, change
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
        wait_until(lambda: health(server)["ortho"] == "unusable")
        assert health(server)["max_alpha"] == 0
        with pytest.raises(openai.InternalServerError) as error:
            ask(client, 1)
        assert "the ortho stream is unusable" in error.value.message
        assert ask(client, 0).choices[0].text == "I am base"
        upstream.cards["ortho"] = upstream.cards["ortho-0.5"] = "base"
        wait_until(lambda: health(server)["ortho"] == "present")
        assert ask(client, 1).choices[0].text == "I am ortho"


def wait_until(true: Any) -> None:
    import time

    until = time.monotonic() + 120
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


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


def test_an_upstream_that_is_gone_is_not_ready(serve, engine, upstream) -> None:
    with serve(engine=engine) as server:
        upstream.trouble = "down"
        wait_until(lambda: httpx2.get(f"{server.url}/readyz").status_code == 503)
        with pytest.raises(openai.InternalServerError) as error:
            ask(server.client(), 0)
        assert error.value.code == "not_ready"
        upstream.trouble = ""
        wait_until(lambda: httpx2.get(f"{server.url}/readyz").status_code == 200)
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


FAKE = """#!{python}
import http.server, json, os, pathlib, sys, time
import libortho_vllm_guard
if "--fail" in sys.argv: sys.exit(3)
for word, value in zip(sys.argv, sys.argv[1:]):
    if word in ("--starting", "--up"):
        pathlib.Path(value + ".part").write_text(str(os.getpid()))
        os.rename(value + ".part", value)
if "--starting" in sys.argv: time.sleep(60)
port = int(sys.argv[sys.argv.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = "Bearer " + os.environ["VLLM_API_KEY"]
        known = self.headers["authorization"] == wanted
        self.send_response(200 if known else 401); self.end_headers()
        self.wfile.write(json.dumps(sys.argv).encode())
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def export(tmp_path) -> Path:
    folder = tmp_path / "export"
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}")
    for name, alpha, rank in (("ortho", 1, 12), ("ortho-0.5", 0.5, 3)):
        (folder / name).mkdir()
        layer = "model.layers.0.mlp.down_proj"
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 2 * alpha,
            "rank_pattern": {layer: rank},
            "alpha_pattern": {layer: rank * alpha},
        }
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def command_line(tmp_path, monkeypatch) -> Path:
    """Where the command `vllm` may stand; there is no vLLM in this environment."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    fake = tmp_path / "vllm"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    return fake


def test_an_export_is_served_on_this_machine_alone(export, command_line) -> None:
    adapters = find_adapters(export)
    assert adapters == {1.0: export / "ortho", 0.5: export / "ortho-0.5"}
    command = serve_command(export, adapters, 8123, ["--host", "0.0.0.0", "--max-loras", "1"])
    assert command[:3] == ["vllm", "serve", str(export / "base")]
    pairs = dict(itertools.pairwise(command))  # the last of each, as vLLM takes them
    assert (pairs["--host"], pairs["--port"]) == ("127.0.0.1", "8123")
    assert pairs["--max-loras"] == "3", "without a spare slot, vLLM on a CPU leaks"
    assert pairs["--max-lora-rank"] == "16", "the least that vLLM knows and the adapters fit"
    modules = {f"ortho={export / 'ortho'}", f"ortho-0.5={export / 'ortho-0.5'}"}
    assert set(command[command.index("--lora-modules") + 1 :]) == modules
    assert "--enable-lora" not in serve_command(export, {}, 1)
    (export / "ortho-x").mkdir()
    with pytest.raises(ValueError, match="ortho-x: expected a folder named ortho or ortho-ALPHA"):
        find_adapters(export)
    with pytest.raises(ValueError, match=r"holds no base/config.json"):
        find_adapters(export / "base")
    (export / "ortho" / "adapter_config.json").write_text('{"r": 600}')
    with pytest.raises(ValueError, match="rank 600: vLLM takes at most 512"):
        serve_command(export, adapters, 1)
    for own in (["--api-key", "mine"], ["--api_key=mine"]):
        with pytest.raises(ValueError, match="--api-key is not for here") as error:
            serve_command(export, {}, 1, own)
        assert "mine" not in str(error.value)


def test_no_door_of_its_vllm_is_open_without_the_key(monkeypatch) -> None:
    """vLLM itself asks for it under /v1 only."""
    monkeypatch.setenv("VLLM_API_KEY", "own-key")

    async def answers(_: Request) -> Response:
        return JSONResponse({"text": "the secret"})

    paths = ["/v1/completions", "/invocations", "/health"]
    inside = Starlette(routes=[Route(path, answers, methods=["GET", "POST"]) for path in paths])

    async def statuses(key: str) -> list[int]:
        transport = httpx2.ASGITransport(RequireKey(inside))
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx2.AsyncClient(transport=transport, base_url="http://vllm") as client:
            return [(await client.post(path, headers=headers)).status_code for path in paths]

    assert asyncio.run(statuses("")) == [401] * 3
    assert asyncio.run(statuses("own-ke")) == [401] * 3
    assert asyncio.run(statuses("own-key")) == [200] * 3
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(RequireKey(inside)({"type": "websocket", "headers": []}, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(KeyError):
        RequireKey(inside)


def test_the_front_and_its_vllm_share_a_key(canary, export, monkeypatch) -> None:
    import libortho.serve.vllm_process as module
    from libortho.cli.serve import _vllm

    given: list[str] = []

    @contextmanager
    def server(_: Path, found: Any, key: str, more: Any) -> Iterator[str]:
        given.append(key)
        yield "http://vllm"

    monkeypatch.setattr(module, "vllm_server", server)
    monkeypatch.setattr("libortho.export.run.check_made_from", lambda *_: None)  # a stand-in
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for _ in range(2):
        with ExitStack() as held:
            engine: Any = _vllm(canary, None, None, [], export, [], Limits(), held)
            assert engine._key == given[-1]
    assert len(given[0]) > 40
    assert given[0] != given[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, r"its name says alpha 0\.5, its scale \(lora_alpha / r\) is 1\.0"),
        ({"lora_alpha": 1}, r"its name says alpha 0\.5, .* is 1\.0"),  # in one layer still
        ({"lora_alpha": 1, "alpha_pattern": None}, r"its name says alpha 0\.5, .* is 0\.08"),
        ({"use_rslora": True}, "expected a plain LoRA adapter"),
        ({"peft_type": "SHIRA"}, "expected a plain LoRA adapter"),
    ],
)
def test_the_name_of_an_adapter_is_not_taken_at_its_word(export, change, told) -> None:
    shutil.rmtree(export / "ortho-0.5")
    (export / "ortho").rename(export / "ortho-0.5")
    path = export / "ortho-0.5" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"ortho-0.5: {told}"):
        find_adapters(export)


def test_an_alpha_has_one_adapter(export) -> None:
    shutil.copytree(export / "ortho", export / "ortho-1.0")
    with pytest.raises(ValueError, match=r"ortho-1\.0: ortho has alpha 1\.0 already"):
        find_adapters(export)


@pytest.mark.parametrize(
    ("report", "told"),
    [
        (None, "does not say which split"),
        ({"libortho": "0.1.0", "target": "peft"}, "does not say which split"),
        ({"streams_sha256": "0" * 64}, "the sha256 000000000000..., those of"),
    ],
)
def test_an_export_of_another_split_is_not_served(export, canary, report, told) -> None:
    if report is not None:
        (export / "libortho_export.json").write_text(json.dumps(report))
    arguments = ["serve", str(canary), "--engine", "vllm", "--export", str(export)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.split())
    assert told in said
    assert "export again" in said


def test_which_vllm_it_is(command_line, monkeypatch) -> None:
    assert program() == ["vllm", "serve"]
    command_line.unlink()
    with pytest.raises(ValueError, match="vLLM is not there: install it, or give --upstream"):
        program()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert program()[0] == sys.executable
    assert program()[-1] == "--model"


def test_the_process_is_started_and_stopped(export, command_line, caplog) -> None:
    options = ["--hf-token", "hf-secret"]
    with (
        caplog.at_level(logging.INFO),
        vllm_server(export, find_adapters(export), "own-key", options, seconds=60) as url,
    ):
        assert httpx2.get(url).status_code == 401
        started = httpx2.get(url, headers={"authorization": "Bearer own-key"}).json()
        assert "--enable-lora" in started
        assert "libortho_vllm_guard.RequireKey" in started
        assert "own-key" not in str(started), "everybody may read a command line"
    assert f"starting vLLM on {url}: vllm" in caplog.text
    assert "secret" not in caplog.text
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url)
    with (
        pytest.raises(RuntimeError, match="status 3"),
        vllm_server(export, {}, "own-key", ["--fail"], seconds=60),
    ):
        pass


@pytest.mark.parametrize("when", ["starting", "up"])
def test_sigterm_leaves_no_vllm_behind(export, command_line, tmp_path, when) -> None:
    mark = tmp_path / "argv"
    script = (
        "import pathlib, time; from libortho.serve.vllm_process import vllm_server\n"
        f"with vllm_server(pathlib.Path({str(export)!r}), {{}}, 'own-key', "
        f"['--{when}', {str(mark)!r}]):\n"
        f"    pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    wait_until((mark if when == "starting" else tmp_path / "up").exists)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    number = int(mark.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
