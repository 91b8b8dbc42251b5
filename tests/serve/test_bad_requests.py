"""What is no request: an error in OpenAI's form, and a server that lives on."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx2
import openai

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


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
def test_bad_input_is_an_openai_error(running, body, status, code, complete) -> None:
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
