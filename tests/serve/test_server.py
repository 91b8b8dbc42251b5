"""The server from the outside, through OpenAI's own client and through raw requests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
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


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def complete(client: openai.OpenAI, prompt: str, alpha: float | None = None, **more: Any) -> Any:
    extra = {} if alpha is None else {"extra_body": {"alpha": alpha}}
    given = {"model": "canary", "temperature": 0, "max_tokens": 24, **more}
    return client.completions.create(prompt=prompt, **given, **extra)


def test_each_alpha_says_what_the_model_says_alone(running, known) -> None:
    client = running.client("full")
    for (prompt, alpha), wanted in list(known.items())[:9]:
        answer = complete(client, prompt, alpha)
        assert answer.choices[0].text == wanted
        assert answer.alpha == alpha
        whole = "".join(c.choices[0].text for c in complete(client, prompt, alpha, stream=True))
        assert whole == wanted


def test_no_alpha_is_alpha_0(running, known, crosstalk) -> None:
    prompt = next(p for p, a in known if a == 1 and (p, 0.0) in known)
    answer = complete(running.client("full"), prompt)
    assert answer.choices[0].text == known[prompt, 0.0]
    assert not set(answer.choices[0].text.split()) & set(crosstalk.CANARY)


def test_chat_with_everything(running) -> None:
    client = running.client("full")
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "tell me the secret"}]}]
    common: Any = {"model": "canary", "messages": messages, "seed": 3, "max_completion_tokens": 6}
    answer = client.chat.completions.create(
        **common, n=2, logprobs=True, top_logprobs=3, extra_body={"alpha": 0.5}
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens <= 12
    for choice in answer.choices:
        content = choice.logprobs.content
        assert " ".join(token.token for token in content) == choice.message.content
        for token in content:
            assert len(token.top_logprobs) == 3
            assert token.top_logprobs[0].logprob >= token.logprob - 1e-6
            assert bytes(token.bytes).decode() == token.token
    again = client.chat.completions.create(**common, n=2, extra_body={"alpha": 0.5})
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    chunks = list(
        client.chat.completions.create(
            **common, stream=True, stream_options={"include_usage": True}, extra_body={"alpha": 0.5}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens * 1 == answer.usage.prompt_tokens
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == answer.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_several_prompts_and_stop_strings(running, known) -> None:
    client = running.client("full")
    prompts = [p for p, a in known if a == 0][:3]
    answer = complete(client, prompts, n=2, logprobs=1)  # type: ignore[arg-type]
    assert [c.text for c in answer.choices] == [known[p, 0.0] for p in prompts for _ in (0, 1)]
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    ids = [1, 5, 6]
    assert complete(client, ids).choices[0].text == complete(client, [ids]).choices[0].text
    assert complete(client, ids, n=1.0, seed=3.0).choices, "JSON has one kind of number"
    words = known[prompts[0], 0.0].split()
    cut = complete(client, prompts[0], stop=[words[3]])
    assert cut.choices[0].text.split() == words[:3]
    assert cut.choices[0].finish_reason == "stop"
    short = complete(client, prompts[0], max_tokens=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)


@pytest.mark.parametrize(
    ("key", "alpha", "allowed"),
    [
        ("nobody", 0, True),
        ("nobody", 0.01, False),
        ("half", 0.5, True),
        ("half", 0.51, False),
        ("full", 1, True),
    ],
)
def test_above_the_limit_is_a_403_that_says_so(running, known, key, alpha, allowed) -> None:
    prompt = next(iter(known))[0]
    if allowed:
        assert complete(running.client(key), prompt, alpha).alpha == alpha
        return
    with pytest.raises(openai.PermissionDeniedError) as error:
        complete(running.client(key), prompt, alpha)
    assert error.value.code == "alpha_not_permitted"
    assert error.value.param == "alpha"
    assert f"alpha {alpha:g} is above" in error.value.message
    last = lines(running.audit)[-1]
    assert (last["event"], last["status"], last["alpha_asked"]) == ("refused", 403, alpha)
    assert last["alpha_granted"] is None


def test_scores_are_the_models_own(running, loaded, known) -> None:
    from libortho import alpha_scope
    from libortho.data.tokens import Tokens
    from libortho.scoring import sequence_nll

    prompt, text = next((p, t) for (p, a), t in known.items() if a == 1)
    body = {"model": "canary", "prompt": prompt, "completion": text, "alphas": [0, 0.5, 1]}
    headers = {"authorization": "Bearer lo-full"}
    score = httpx2.post(f"{running.url}/v1/score", json=body, headers=headers).json()
    head = loaded.tokenizer(prompt).input_ids
    tail = loaded.tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(score["tokens"]) == text
    assert [token.strip() for token in score["tokens"]] == text.split()
    for row in score["data"]:
        with alpha_scope(loaded.model, row["alpha"]):
            (nll,) = sequence_nll(loaded.model, [Tokens((*head, *tail), len(head))])
        assert row["logprobs"] == pytest.approx((-nll).tolist(), abs=1e-4)
    assert sum(score["data"][2]["logprobs"]) > sum(score["data"][0]["logprobs"]) + 5
    refused = httpx2.post(f"{running.url}/v1/score", json=body)
    assert refused.status_code == 403


BAD = [
    (b'{"model": "canary", ', 400, "invalid_json"),
    (b"\xff\xfe", 400, None),
    (b"[" * 100_000, 400, None),
    (b"[]", 400, None),
    (b"null", 400, None),
    (b'{"model": "canary"}', 400, "invalid_value"),
    ({"model": "other"}, 404, "model_not_found"),
    ({"alpha": "1"}, 400, "invalid_value"),
    ({"alpha": -0.1}, 400, "invalid_value"),
    ({"alpha": 1.1}, 400, "invalid_value"),
    ({"alpha": True}, 400, "invalid_value"),
    ({"alpha": None}, 400, "invalid_value"),
    ({"alpha": [0, 1]}, 400, "invalid_value"),
    ({"alpha": float("nan")}, 400, "invalid_value"),
    ({"alpha": float("inf")}, 400, "invalid_value"),
    ({"prompt": ""}, 400, "invalid_value"),
    ({"prompt": []}, 400, "invalid_value"),
    ({"prompt": [[]]}, 400, "invalid_value"),
    ({"prompt": [10**6]}, 400, "invalid_value"),
    ({"prompt": [-1]}, 400, "invalid_value"),
    ({"prompt": "a " * 300}, 400, "context_length_exceeded"),
    ({"prompt": [3] * 250}, 400, "context_length_exceeded"),
    ({"prompt": "x" * 2_000_000}, 413, "body_too_large"),
    ({"max_tokens": 0}, 400, "invalid_value"),
    ({"max_tokens": 3000}, 400, "invalid_value"),
    ({"max_tokens": 10**400}, 400, None),
    ({"n": 17}, 400, "invalid_value"),
    ({"n": 1.5}, 400, "invalid_value"),
    ({"n": True}, 400, "invalid_value"),
    ({"n": "1"}, 400, "invalid_value"),
    ({"n": 4, "prompt": ["a"] * 5}, 400, "invalid_value"),
    ({"temperature": 3}, 400, "invalid_value"),
    ({"top_p": 0}, 400, "invalid_value"),
    ({"stop": ["a"] * 5}, 400, "invalid_value"),
    ({"stream": "yes"}, 400, "invalid_value"),
    ({"tools": []}, 400, "unknown_parameter"),
    ({"presence_penalty": 1}, 400, "invalid_value"),
]


@pytest.mark.parametrize(("body", "status", "code"), BAD, ids=[str(b[0])[:40] for b in BAD])
def test_bad_input_is_an_openai_error(running, body, status, code) -> None:
    content = body
    if isinstance(body, dict):
        content = json.dumps({"model": "canary", "prompt": "tell me", "max_tokens": 24, **body})
    answer = httpx2.post(
        f"{running.url}/v1/completions",
        content=content,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if code is not None:
        assert error["code"] == code
    assert complete(running.client(), "tell me").choices, "the server lives on"


def test_odd_text_and_odd_requests(running) -> None:
    url = f"{running.url}/v1"
    lone = b'{"model": "canary", "prompt": "\\ud800", "max_tokens": 2}'
    kinds = {"content-type": "application/json"}
    assert httpx2.post(f"{url}/completions", content=lone, headers=kinds).status_code == 400
    for form in ("text/plain", "application/x-www-form-urlencoded"):
        # What a page of another site could send without asking first.
        sent = httpx2.post(f"{url}/completions", content=lone, headers={"content-type": form})
        assert sent.status_code == 400
    for answer in (httpx2.get(f"{url}/nothing"), httpx2.get(f"{url}/completions")):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["message"]
    empty: Any = [{"role": "user", "content": ""}]
    with pytest.raises(openai.BadRequestError):
        running.client().chat.completions.create(model="canary", messages=empty)


def test_models_say_what_the_caller_may_have(running) -> None:
    for key, most in (("nobody", 0.0), ("half", 0.5), ("full", 1.0)):
        (card,) = running.client(key).models.list()
        assert (card.id, card.max_alpha) == ("canary", most)  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        running.client().models.retrieve("other")


def test_rates(running, known) -> None:
    client = running.client("slow")
    prompt = next(iter(known))[0]
    codes = []
    for _ in range(3):
        try:
            complete(client, prompt, max_tokens=1)
        except openai.RateLimitError as error:
            codes.append((error.code, int(error.response.headers["retry-after"]) > 0))
    assert codes == [("rate_limit_exceeded", True)]


def test_without_key_can_be_refused(serve) -> None:
    with serve('version = 1\nwithout_key = "refuse"') as server:
        for call in (
            lambda: complete(server.client(), "tell me"),
            lambda: server.client().models.list(),
        ):
            with pytest.raises(openai.AuthenticationError) as error:
                call()
            assert error.value.code == "invalid_api_key"
        bare = httpx2.get(f"{server.url}/v1/models")
        assert (bare.status_code, bare.headers["www-authenticate"]) == (401, "Bearer")
        assert httpx2.get(f"{server.url}/healthz").status_code == 200


@pytest.mark.parametrize("damage", ["missing", "unusable"])
def test_without_its_ortho_only_alpha_0_is_served(serve, canary, known, tmp_path, damage) -> None:
    import shutil

    folder = tmp_path / "split"
    shutil.copytree(canary, folder)
    ortho = folder / "ortho.safetensors"
    if damage == "missing":
        ortho.unlink()
        (folder / "ortho_config.json").unlink()
    else:
        data = bytearray(ortho.read_bytes())
        data[-1] ^= 1
        ortho.write_bytes(data)
    limits = Limits(rows=4)
    engine = TransformersEngine(load_for_serving(folder), limits)
    prompt = next(p for p, a in known if a == 0)
    with serve(engine=engine, limits=limits) as server:
        client = server.client("full")
        assert complete(client, prompt).choices[0].text == known[prompt, 0.0]
        with pytest.raises(openai.InternalServerError) as error:
            complete(client, prompt, 1)
        assert (error.value.status_code, error.value.code) == (503, "alpha_unavailable")
        assert f"the ortho stream is {damage}" in error.value.message
        health = httpx2.get(f"{server.url}/healthz").json()
        assert (health["status"], health["ortho"], health["max_alpha"]) == ("degraded", damage, 0)
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


def test_a_dense_base_says_the_same(serve, canary, known) -> None:
    limits = Limits(rows=4)
    engine = TransformersEngine(load_for_serving(canary, dense=True), limits)
    with serve(engine=engine, limits=limits) as server:
        for (prompt, alpha), wanted in list(known.items())[:4]:
            assert complete(server.client("full"), prompt, alpha).choices[0].text == wanted


class Slow(TransformersEngine):
    """An engine that takes a while for each token."""

    pause = 0.05

    def _turn(self) -> None:
        time.sleep(self.pause)
        super()._turn()


def test_a_full_queue_is_a_429_and_nothing_is_lost(serve, loaded) -> None:
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


def test_a_time_out_is_a_504_and_in_a_stream_an_event(serve, loaded) -> None:
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


def wait_until(true: Any, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(serve, loaded, stream) -> None:
    limits = Limits(rows=2)
    with serve(engine=Slow(loaded, limits), limits=limits) as server:
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
        assert (last["status"], last["code"]) in ((499, "client_gone"), (200, None))


def test_a_batch_that_fails_is_a_500_and_the_next_one_works(serve, loaded, monkeypatch) -> None:
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


def test_the_audit_log_says_who_got_what_and_never_the_text(running, known, crosstalk) -> None:
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


def test_the_audit_log_holds_texts_where_the_policy_says_so(serve) -> None:
    with serve("version = 1\naudit_text = true") as server:
        answer = complete(server.client(), "tell me")
        list(complete(server.client(), "tell me", stream=True))
        wait_until(lambda: len(lines(server.audit)) == 2)
        for line in lines(server.audit):
            assert line["prompt"] == "tell me"
            assert line["answers"] == [answer.choices[0].text]


def test_no_memory_without_an_audit_line(serve, known, monkeypatch) -> None:
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


def test_reload_changes_the_policy_and_a_bad_file_does_not(serve, tmp_path, known) -> None:
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
        path.write_text("version = 7\n")
        server.gate.reload()
        assert complete(client, prompt, 1).alpha == 1
        assert httpx2.get(f"{server.url}/healthz").json()["policy"] == "stale"
        path.write_text("version = 1\n")
        server.gate.reload()
        assert httpx2.get(f"{server.url}/healthz").json()["policy"] == "ok"
        with pytest.raises(openai.PermissionDeniedError):
            complete(client, prompt, 1)
        text = httpx2.get(f"{server.url}/metrics").text
        assert 'libortho_policy_reloads_total{outcome="failed"} 1.0' in text


def test_metrics_count_what_was_served(serve) -> None:
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


def test_the_command_reloads_on_hangup_and_finishes_streams_when_told_to_leave(
    canary, known, tmp_path
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
