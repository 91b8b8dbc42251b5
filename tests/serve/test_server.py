"""The server's answers from the outside, through OpenAI's own client."""

from __future__ import annotations

import asyncio
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


def test_each_alpha_says_what_the_model_says_alone(running, known, complete) -> None:
    client = running.client("full")
    for (prompt, alpha), wanted in list(known.items())[:9]:
        answer = complete(client, prompt, alpha)
        assert answer.choices[0].text == wanted
        assert answer.alpha == alpha
        whole = "".join(c.choices[0].text for c in complete(client, prompt, alpha, stream=True))
        assert whole == wanted


def test_no_alpha_is_alpha_0(running, known, crosstalk, complete) -> None:
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


def test_several_prompts_and_stop_strings(running, known, complete) -> None:
    client = running.client("full")
    prompts = [p for p, a in known if a == 0][:3]
    answer = complete(client, prompts, n=2, logprobs=1)  # type: ignore[arg-type]
    assert [c.text for c in answer.choices] == [known[p, 0.0] for p in prompts for _ in (0, 1)]
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    chunks = complete(client, prompts[0], logprobs=1, stream=True, stop=["nothing of the kind"])
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [at for piece in pieces for at in piece.text_offset] == logprobs.text_offset
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
def test_above_the_limit_is_a_403_that_says_so(
    running, known, key, alpha, allowed, lines, complete
) -> None:
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


def test_a_score_is_made_once_an_alpha_within_bounds_and_takes_turns(
    serve, loaded, known, monkeypatch
) -> None:
    import libortho.serve.rows as rows

    read: list[int] = []
    done: list[str] = []
    real_read, real_turn = rows.RunningRows.read, TransformersEngine._turn

    def noted(self: Any, tokens: Any) -> Any:
        read.append(len(tokens))
        done.append("step")
        return real_read(self, tokens)

    def turn(self: Any) -> None:
        done.append("turn")
        real_turn(self)

    monkeypatch.setattr(rows, "READ_AT_ONCE", 3)
    monkeypatch.setattr(rows.RunningRows, "read", noted)
    monkeypatch.setattr(TransformersEngine, "_turn", turn)
    prompt, text = next((p, t) for (p, a), t in known.items() if a == 1)
    words = text.split()
    limits = Limits(rows=2, max_tokens=len(words))
    body = {"model": "canary", "prompt": prompt, "completion": text, "alphas": [1, 0, 1, 1]}
    headers = {"authorization": "Bearer lo-full"}
    with serve(engine=TransformersEngine(loaded, limits), limits=limits) as server:
        url = f"{server.url}/v1/score"
        score = httpx2.post(url, json=body, headers=headers).json()
        assert [row["alpha"] for row in score["data"]] == [1, 0, 1, 1]
        assert score["data"][0]["logprobs"] == score["data"][3]["logprobs"]
        assert len(score["data"][0]["logprobs"]) == len(words)
        assert max(read) == 3
        assert sum(read) == 2 * (len(words) - 1), "alpha 1 once, alpha 0 once"
        assert "step,step" not in ",".join(done), "answers get their turn after every step"
        longer = httpx2.post(url, json={**body, "completion": f"{text} one"}, headers=headers)
        assert longer.status_code == 400
        assert f"a completion of {len(words) + 1} tokens" in longer.json()["error"]["message"]


def test_models_say_what_the_caller_may_have(running) -> None:
    for key, most in (("nobody", 0.0), ("half", 0.5), ("full", 1.0)):
        (card,) = running.client(key).models.list()
        assert (card.id, card.max_alpha) == ("canary", most)  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        running.client().models.retrieve("other")


def test_rates(running, known, complete) -> None:
    client = running.client("slow")
    prompt = next(iter(known))[0]
    codes = []
    for _ in range(3):
        try:
            complete(client, prompt, max_tokens=1)
        except openai.RateLimitError as error:
            codes.append((error.code, int(error.response.headers["retry-after"]) > 0))
    assert codes == [("rate_limit_exceeded", True)]


def test_the_rate_of_an_address_is_not_reset_by_a_header(serve) -> None:
    body = {"model": "canary", "prompt": "tell me", "max_tokens": 1}
    with serve("version = 1\nwithout_key_requests_per_minute = 2") as server:
        statuses = [
            httpx2.post(
                f"{server.url}/v1/completions",
                json=body,
                headers={"x-forwarded-for": f"192.0.2.{i}"},
            ).status_code
            for i in range(3)
        ]
    assert statuses == [200, 200, 429]


@pytest.mark.parametrize(
    ("proxies", "seen"),
    [([], "127.0.0.1"), (["127.0.0.1"], "192.0.2.7"), (["127.0.0.0/8"], "192.0.2.7"),
     (["192.0.2.1"], "127.0.0.1")],
)  # fmt: skip
def test_a_proxy_is_believed_where_it_was_named(running, proxies, seen) -> None:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from libortho.serve.run import make_server

    async def who(request: Any) -> Any:
        return PlainTextResponse(request.client.host)

    app: Any = Starlette(routes=[Route("/", who)])
    config = make_server(app, running.gate, trusted_proxies=proxies).config
    config.load()

    async def ask() -> str:
        transport = httpx2.ASGITransport(config.loaded_app, client=("127.0.0.1", 5))  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get("/", headers={"x-forwarded-for": "192.0.2.7"})).text

    assert asyncio.run(ask()) == seen


@pytest.mark.parametrize("proxy", ["*", "proxy.example", "10.0.0.1/8", ""])
def test_a_trusted_proxy_is_an_address(running, proxy) -> None:
    from libortho.serve.run import make_server

    with pytest.raises(ValueError, match=r"--trusted-proxy .*: expected an address or a network"):
        make_server(running.gate, running.gate, trusted_proxies=[proxy])


def test_addresses_push_no_keys_bucket_out(running) -> None:
    gate = running.gate
    assert gate.rates is not gate.address_rates
    gate.rates.take("slow-one", 1)
    for i in range(10_001):
        gate.address_rates.take(str(i), 1)
    assert gate.rates.take("slow-one", 1) > 0


def test_without_key_can_be_refused(serve, complete) -> None:
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


def test_a_dense_base_says_the_same(serve, canary, known, complete) -> None:
    limits = Limits(rows=4)
    engine = TransformersEngine(load_for_serving(canary, dense=True), limits)
    with serve(engine=engine, limits=limits) as server:
        for (prompt, alpha), wanted in list(known.items())[:4]:
            assert complete(server.client("full"), prompt, alpha).choices[0].text == wanted
