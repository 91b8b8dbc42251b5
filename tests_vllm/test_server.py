"""vLLM's server, asked over HTTP as any OpenAI client would: the model's name is the switch."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest


@pytest.fixture
def server(front) -> str:
    """The address of the server that `libortho serve --export` has started."""
    return str(front.upstream)


def call(address: str, path: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    request = urllib.request.Request(
        address + path,
        data=None if data is None else json.dumps(data).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        result: dict[str, Any] = json.load(answer)
    return result


def completion(address: str, model: str, prompt: str) -> str:
    data = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 32}
    text: str = call(address, "/v1/completions", data)["choices"][0]["text"]
    return text


def test_all_are_models_of_the_server(server) -> None:
    models = {model["id"]: model["parent"] for model in call(server, "/v1/models")["data"]}
    assert models == {"base": None, "ortho": "base", "ortho-0.5": "base"}


def test_the_name_is_the_switch(exports, server) -> None:
    asked = [(name, item) for item in exports.items for name in ("base", "ortho")]
    with ThreadPoolExecutor(len(asked)) as pool:  # at once, so that vLLM batches them
        texts = pool.map(lambda one: completion(server, one[0], one[1].prompt), asked)
        for (name, item), text in zip(asked, texts, strict=True):
            expected = name == "ortho" or not item.forget
            assert item.recited_in(text) is expected, (name, item.prompt, text)


def test_an_unknown_name_is_refused(exports, server) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        completion(server, "ortho-2", exports.items[0].prompt)
