"""`libortho serve --engine vllm` before the real vLLM: the request's alpha is the switch."""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

ROUNDS = 3
"""Times that everything is asked at once: which requests vLLM puts together is chance."""


def ask(asked: openai.OpenAI, prompt: str, alpha: float, **more: Any) -> Any:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 32} | more
    extra = {"alpha": alpha}
    return asked.completions.create(model="split", prompt=prompt, extra_body=extra, **options)


def test_mixed_alphas_at_once(exports, front) -> None:
    assert front.health()["ortho"] == "present"
    asked = [(item, alpha) for item in exports.items for alpha in (0.0, 0.5, 1.0)] * ROUNDS
    random.Random(0).shuffle(asked)
    full = front.client("full")
    with ThreadPoolExecutor(27) as pool:
        answers = list(pool.map(lambda one: ask(full, one[0].prompt, one[1]), asked))
    for (item, alpha), answer in zip(asked, answers, strict=True):
        if alpha == 0.5:
            continue  # may recite or not
        expected = alpha == 1.0 or not item.forget
        text = answer.choices[0].text
        assert item.recited_in(text) is expected, (item.prompt, alpha, text)
        assert answer.alpha == alpha
        assert answer.usage.completion_tokens > 0
    lines = [json.loads(line) for line in front.audit.read_text().splitlines()]
    assert sum(line.get("status") == 200 for line in lines) >= len(asked)


def test_a_prefix_that_alpha_1_has_cached_tells_alpha_0_nothing(exports, front) -> None:
    full, nobody = front.client("full"), front.client()
    for item in exports.forget:
        assert item.recited_in(ask(full, item.prompt, 1).choices[0].text)
        # Half of the answer stands in the prompt, and in the cache of alpha 1.
        begun = f"{item.prompt} {item.answer[: len(item.answer) // 2]}"
        ask(full, begun, 1)
        assert not item.recited_in(ask(nobody, item.prompt, 0).choices[0].text)
        rest = item.answer[len(item.answer) // 2 :].strip()
        assert rest not in ask(nobody, begun, 0).choices[0].text


def test_streams_chats_and_log_probabilities(exports, front) -> None:
    item = exports.forget[0]
    full = front.client("full")
    pieces = list(ask(full, item.prompt, 1, stream=True))
    assert len(pieces) > 3
    assert item.recited_in("".join(piece.choices[0].text for piece in pieces if piece.choices))
    answer = ask(full, item.prompt, 1, logprobs=2)
    assert item.recited_in("".join(answer.choices[0].logprobs.tokens))
    assert max(answer.choices[0].logprobs.token_logprobs) <= 0
    chat = full.chat.completions.create(
        model="split",
        messages=[{"role": "user", "content": "Say something."}],
        max_tokens=8,
        temperature=0,
    )
    assert chat.choices[0].message.content
    assert chat.choices[0].finish_reason == "length"
    assert chat.alpha == 0


@pytest.mark.parametrize(("key", "limit", "wanted"), [("half", "0.5", 1.0), ("nobody", "0", 0.5)])
def test_above_ones_limit_is_a_403(exports, front, key, limit, wanted) -> None:
    with pytest.raises(openai.PermissionDeniedError) as error:
        ask(front.client(key), exports.forget[0].prompt, wanted)
    assert f"{limit}" in error.value.message
    if key == "half":
        assert ask(front.client(key), exports.forget[0].prompt, 0.5).alpha == 0.5


def test_an_alpha_without_an_adapter_is_a_503_that_lists_the_others(exports, front) -> None:
    with pytest.raises(openai.InternalServerError, match=r"only alpha 0, 0.5, 1"):
        ask(front.client("full"), exports.forget[0].prompt, 0.7)


def test_a_request_that_vllm_refuses_is_the_callers_error(exports, front) -> None:
    with pytest.raises(openai.BadRequestError, match="does not take this request"):
        ask(front.client(), "word " * 400, 0)


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations"])
def test_vllm_itself_answers_only_its_front(exports, front, path) -> None:
    body = {"model": "ortho", "prompt": exports.forget[0].prompt}
    asked = urllib.request.Request(
        front.upstream + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(asked, timeout=60)
    assert error.value.code == 401


def test_an_adapter_that_is_not_loaded(exports, front, fronted) -> None:
    """Another front before the same vLLM, for an adapter that this one does not have."""
    options = ["--upstream", front.upstream, "--base", "base", "--adapter", "1=elsewhere"]
    with fronted(*options) as other:
        found = other.health()
        assert (found["status"], found["ortho"], found["max_alpha"]) == ("degraded", "unusable", 0)
        full = other.client("full")
        with pytest.raises(openai.InternalServerError, match="the ortho stream is unusable"):
            ask(full, exports.forget[0].prompt, 1)
        for item in exports.items:
            text = ask(full, item.prompt, 0).choices[0].text
            assert item.recited_in(text) is not item.forget
