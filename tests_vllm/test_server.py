"""vLLM's server, asked over HTTP as its front asks it: the model's name is the switch."""

from __future__ import annotations

import urllib.error
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest


def completion(front: Any, model: str, prompt: str) -> str:
    data = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 32}
    text: str = front.ask_upstream("/v1/completions", data)["choices"][0]["text"]
    return text


def test_all_are_models_of_the_server(front) -> None:
    models = {model["id"]: model["parent"] for model in front.ask_upstream("/v1/models")["data"]}
    assert models == {"base": None, "ortho": "base", "ortho-0.5": "base"}


def test_the_name_is_the_switch(exports, front) -> None:
    asked = [(name, item) for item in exports.items for name in ("base", "ortho")]
    with ThreadPoolExecutor(len(asked)) as pool:  # at once, so that vLLM batches them
        texts = pool.map(lambda one: completion(front, one[0], one[1].prompt), asked)
        for (name, item), text in zip(asked, texts, strict=True):
            expected = name == "ortho" or not item.forget
            assert item.recited_in(text) is expected, (name, item.prompt, text)


def test_an_unknown_name_is_refused(exports, front) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        completion(front, "ortho-2", exports.items[0].prompt)
