"""The vLLM that the server starts on an export, with a stand-in for its command."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import shutil
import signal
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
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner

from libortho.cli import app
from libortho.serve.engine_vllm import VllmEngine
from libortho.serve.limits import Limits
from libortho.serve.vllm_guard import RequireKey
from libortho.serve.vllm_process import find_adapters, program, serve_command, vllm_server

FAKE = """#!{python}
import http.server, json, os, pathlib, sys, time
import libortho_vllm_guard
if "--fail" in sys.argv: sys.exit(3)
for word, value in zip(sys.argv, sys.argv[1:]):
    if word in ("--starting", "--up"):
        pathlib.Path(value + ".part").write_text(str(os.getpid()))
        os.rename(value + ".part", value)
    if word == "--environment": pathlib.Path(value).write_text(" ".join(os.environ))
if "--starting" in sys.argv: time.sleep(60)
port = int(sys.argv[sys.argv.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = "Bearer " + os.environ["VLLM_API_KEY"]
        known = self.headers["authorization"] == wanted
        self.send_response(200 if known else 401); self.end_headers()
        models = {{"data": [{{"id": "base"}}]}}
        found = models if self.path == "/v1/models" else sys.argv
        self.wfile.write(json.dumps(found).encode())
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


def test_no_proxy_stands_between_the_front_and_its_vllm(
    canary, export, command_line, monkeypatch
) -> None:
    # What companies set for whatever goes out: it would get every prompt, and the key.
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    async def front(url: str) -> None:
        engine = VllmEngine(canary, url, "base", {}, Limits(), "own-key")
        await engine.start()
        await engine.stop()

    with vllm_server(export, {}, "own-key", seconds=60) as url:
        asyncio.run(front(url))


def test_vllm_does_not_get_the_key_of_the_ortho_stream(
    export, command_line, tmp_path, monkeypatch
) -> None:
    mark = tmp_path / "environment"
    monkeypatch.setenv("LIBORTHO_ORTHO_KEY", "ab" * 32)
    with vllm_server(export, {}, "own-key", ["--environment", str(mark)], seconds=60):
        names = mark.read_text().split()
    assert "VLLM_API_KEY" in names
    assert "LIBORTHO_ORTHO_KEY" not in names


@pytest.mark.parametrize("when", ["starting", "up"])
def test_sigterm_leaves_no_vllm_behind(export, command_line, tmp_path, when, wait_until) -> None:
    mark = tmp_path / "argv"
    script = (
        "import pathlib, time; from libortho.serve.vllm_process import vllm_server\n"
        f"with vllm_server(pathlib.Path({str(export)!r}), {{}}, 'own-key', "
        f"['--{when}', {str(mark)!r}]):\n"
        f"    pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    wait_until((mark if when == "starting" else tmp_path / "up").exists, 120)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    number = int(mark.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
