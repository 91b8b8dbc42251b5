"""What an operator sees and does: audit log, metrics, a new policy, signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx2
import openai
import uvicorn
from typer.testing import CliRunner

from libortho.cli import app

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_the_audit_log_says_who_got_what_and_never_the_text(
    running, known, crosstalk, lines, complete, wait_until
) -> None:
    prompt, wanted = next((p, t) for (p, a), t in known.items() if a == 1)
    complete(running.client("full"), prompt, 1)
    wait_until(lambda: lines(running.audit)[-1]["event"] == "finished")
    admitted, finished = lines(running.audit)[-2:]
    assert admitted["event"] == "admitted"
    assert admitted["request"] == finished["request"]
    assert (finished["key"], finished["alpha_asked"], finished["alpha_granted"]) == ("full", 1, 1)
    assert finished["model_digest"] == running.gate.engine.digest
    assert finished["completion_tokens"] == len(wanted.split()) + 1
    assert finished["status"] == 200
    whole = running.audit.read_text()
    assert not any(word in whole for word in (*crosstalk.CANARY, "lo-full", "room"))
    assert oct(running.audit.stat().st_mode & 0o777) == "0o600"


def test_the_audit_log_holds_texts_where_the_policy_says_so(
    serve, lines, complete, wait_until
) -> None:
    with serve("version = 1\naudit_text = true") as server:
        answer = complete(server.client(), "tell me")
        list(complete(server.client(), "tell me", stream=True))
        wait_until(lambda: len(lines(server.audit)) == 2)
        for line in lines(server.audit):
            assert line["prompt"] == "tell me"
            assert line["answers"] == [answer.choices[0].text]
        messages = [{"role": "user", "content": "tell me"}]
        for asked, told in (({"prompt": "tell me"}, "tell me"), ({"messages": messages}, messages)):
            body = {"model": "canary", "completion": "the secret", **asked}
            assert httpx2.post(f"{server.url}/v1/score", json=body).status_code == 200
            last = lines(server.audit)[-1]
            assert (last["prompt"], last["completion"]) == (told, "the secret")


def test_a_request_of_a_wrong_form_leaves_no_line(serve) -> None:
    with serve() as server:
        for body in ({"n": 99}, {"tools": []}, {"max_tokens": 10**6}):
            asked = {"model": "canary", "prompt": "tell me", **body}
            assert httpx2.post(f"{server.url}/v1/completions", json=asked).status_code == 400
        assert server.audit.read_text() == ""


def test_no_memory_without_an_audit_line(serve, known, monkeypatch, complete) -> None:
    prompt = next(iter(known))[0]
    with serve() as server:
        monkeypatch.setattr(os, "write", _disk_full(os.write, server.gate.audit))
        client = server.client("full")
        assert complete(client, prompt, 0).choices
        with pytest.raises(openai.InternalServerError) as error:
            complete(client, prompt, 1)
        assert (error.value.status_code, error.value.code) == (503, "audit_failing")
        assert httpx2.get(f"{server.url}/healthz").json()["audit"] == "failing"
        monkeypatch.undo()
        assert complete(client, prompt, 1).choices
        assert httpx2.get(f"{server.url}/healthz").json()["audit"] == "ok"


def _disk_full(write: Any, audit: Any) -> Any:
    def failing(descriptor: int, data: bytes) -> int:
        if descriptor == audit._descriptor:
            raise OSError(28, "No space left on device")
        return int(write(descriptor, data))

    return failing


def test_reload_changes_the_policy_and_a_bad_file_does_not(
    serve, tmp_path, known, complete
) -> None:
    from libortho.serve.keys import digest

    prompt = next(iter(known))[0]
    path = tmp_path / "policy.toml"
    path.write_text("version = 1\n")
    with serve("version = 1", policy_path=path) as server:
        client = server.client("lo-new")
        with pytest.raises(openai.PermissionDeniedError):
            complete(client, prompt, 1)
        key = f'[[keys]]\nid = "new"\nsha256 = "{digest("lo-new")}"\nmax_alpha = 1.0\n'
        path.write_text("version = 1\n" + key)
        server.gate.reload()
        assert complete(client, prompt, 1).alpha == 1
        for bad in ("version = 7\n", "version = " + "9" * 5000):
            server.gate.policy_stale = False
            path.write_text(bad)
            server.gate.reload()
            assert complete(client, prompt, 1).alpha == 1
            assert httpx2.get(f"{server.url}/healthz").json()["policy"] == "stale"
        path.write_text("version = 1\n")
        server.gate.reload()
        assert httpx2.get(f"{server.url}/healthz").json()["policy"] == "ok"
        with pytest.raises(openai.PermissionDeniedError):
            complete(client, prompt, 1)
        text = httpx2.get(f"{server.url}/metrics").text
        assert 'libortho_policy_reloads_total{outcome="failed"} 2.0' in text


def test_a_reload_whose_audit_log_cannot_be_opened_changes_no_policy(
    serve, tmp_path, monkeypatch
) -> None:
    from libortho.serve.keys import digest

    path = tmp_path / "policy.toml"
    key = f'[[keys]]\nid = "new"\nsha256 = "{digest("lo-new")}"\nmax_alpha = 1.0\n'
    path.write_text("version = 1\n" + key)
    with serve("version = 1", policy_path=path) as server:
        before = server.gate.policy
        with monkeypatch.context() as patch:
            patch.setattr(server.gate.audit, "path", tmp_path)  # a folder
            server.gate.reload()
        assert server.gate.policy is before
        assert httpx2.get(f"{server.url}/healthz").json()["policy"] == "stale"
        server.gate.reload()
        assert [rule.id for rule in server.gate.policy.keys] == ["new"]


def test_metrics_count_what_was_served(serve, complete) -> None:
    with serve() as server:
        complete(server.client(), "tell me", max_tokens=3)
        complete(server.client("full"), "tell me", 1, max_tokens=3)
        httpx2.get(f"{server.url}/made/up/path")
        text = httpx2.get(f"{server.url}/metrics").text
    for line in (
        'libortho_requests_total{route="/v1/completions",status="200"} 2.0',
        'libortho_requests_total{route="other",status="404"} 1.0',
        'libortho_tokens_total{kind="completion",stream="ortho"} 3.0',
        "libortho_ortho_present 1.0",
        "libortho_alpha_granted_count 2.0",
    ):
        assert line in text.splitlines(), text


@pytest.mark.parametrize("command", ["serve", "ui"])
def test_a_conversation_is_put_in_the_form_of_the_split(
    command, canary, tmp_path, monkeypatch
) -> None:
    import libortho.cli.serve as module

    asked = []
    monkeypatch.setattr(module, "_run", lambda engine, *_: asked.append(engine.template))
    folder = tmp_path / "split"
    shutil.copytree(canary, folder)
    for settings, more in (
        ({"template": "plain"}, []),
        ({"template": "plain"}, ["--template", "chat"]),
        ({}, []),
    ):
        report = {"layers": [], "settings": settings}
        (folder / "report.json").write_text(json.dumps(report))
        done = CliRunner().invoke(app, [command, str(folder), *more])
        assert done.exit_code == 0, done.output
    assert asked == ["plain", "chat", "chat"]


@pytest.mark.parametrize(("command", "place"), [("serve", "/v1"), ("ui", "/ui/#token=lo-")])
def test_the_address_that_is_printed_is_the_one_that_listens(
    canary, monkeypatch, command: str, place: str
) -> None:
    async def leave(_: uvicorn.Server) -> None:
        pass

    monkeypatch.setattr(uvicorn.Server, "main_loop", leave)
    done = CliRunner().invoke(app, [command, str(canary), "--port", "0"])
    assert done.exit_code == 0, done.output
    assert re.search(rf"^serving http://127\.0\.0\.1:[1-9]\d+{place}", done.output, re.MULTILINE)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, [command, str(canary), "--port", str(port)])
    assert done.exit_code == 2, done.output
    assert f"cannot listen on 127.0.0.1, port {port}" in done.output
    assert "serving" not in done.output


def test_the_command_reloads_on_hangup_and_finishes_streams_when_told_to_leave(
    canary, known, tmp_path, lines, complete, wait_until
) -> None:
    from libortho.serve.keys import digest

    policy, audit = tmp_path / "policy.toml", tmp_path / "audit.jsonl"
    policy.write_text("version = 1\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", "from libortho.cli import app; app()", "serve", str(canary),
         "--policy", str(policy), "--port", str(port), "--audit", str(audit), "--name", "canary"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _answers(f"{url}/readyz"), 240)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="lo-k", max_retries=0)
        stream = complete(client, "tell me", max_tokens=240, stream=True, temperature=2, seed=1)
        chunks = [next(stream)]
        key = f'[[keys]]\nid = "k"\nsha256 = "{digest("lo-k")}"\nmax_alpha = 1.0\n'
        policy.write_text("version = 1\n" + key)
        process.send_signal(signal.SIGHUP)
        prompt = next(p for p, a in known if a == 1)

        def granted() -> bool:
            try:
                return complete(client, prompt, 1).choices[0].text == known[prompt, 1.0]
            except openai.PermissionDeniedError:
                return False

        wait_until(granted)
        last = complete(client, prompt, 1, stream=True)
        text = next(last).choices[0].text
        process.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].text for chunk in last)
        assert text == known[prompt, 1.0]
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert {line["status"] for line in lines(audit) if line["event"] == "finished"} == {200}
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return bool(httpx2.get(url).status_code == 200)
    except httpx2.HTTPError:
        return False
