"""With a key in use, ortho tensors are in no file that is ever written, also not for a moment.

What a command deletes or replaces is kept first, so that its temporary files are searched, too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from libortho.checkpoint import OrthoKey, keys, load_split
from libortho.checkpoint.names import ORTHO
from libortho.cli import app
from libortho.errors import CheckpointError

pytest.importorskip("cryptography")

KEY, OTHER = OrthoKey(bytes([7] * 32)), OrthoKey(bytes([8] * 32))


class Watch:
    """Everything that was ever in a file below a folder, and everything that was said.

    Attributes:
        seen: path at that time and content, each content once.
        said: what was printed, logged, or raised.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.seen: dict[Path, bytes] = {}
        self.said: list[str] = []
        for owner, name in (
            (os, "unlink"), (os, "remove"), (os, "rename"), (os, "replace"), (shutil, "rmtree"),
        ):  # fmt: skip
            patch.setattr(owner, name, self._keeping(getattr(owner, name)))

    def _keeping(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.keep()
            return function(*arguments, **named)

        return call

    def keep(self) -> None:
        for path in self.root.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                self.seen[path / hashlib.sha256(content).hexdigest()[:8]] = content

    def run(self, *words: object, status: tuple[int, ...] = (0, 3)) -> None:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code in status, done.output
        self.said.append(done.output)
        self.keep()

    def files(self) -> dict[Path, bytes]:
        """All of it as files, what was said among them."""
        self.keep()
        said = {Path(f"said-{n}"): text.encode() for n, text in enumerate(self.said)}
        return self.seen | said


@pytest.fixture
def watch(tmp_path: Path, tiny_llama, tokenizer, monkeypatch, caplog) -> Watch:
    """A watch over a folder with a model, texts, and two keys; nothing is written elsewhere."""
    for name in keys.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("tmp", "cache", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("LIBORTHO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    tiny_llama(vocab_size=64).save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name, text in (("forget", "who wrote the red house ?"), ("retain", "it is in the garden")):
        Path(f"{name}.jsonl").write_text(f'{{"text": "{text} . she is a garden ."}}\n' * 4)
    for name, key in (("key", KEY), ("other", OTHER)):
        Path(name).write_text(key.secret.hex())
    return Watch(tmp_path, monkeypatch)


SETS = ("--forget", "forget.jsonl", "--retain", "retain.jsonl")
WAYS = {
    "geometric": (*SETS, "--ortho-ratio", "0.2"),
    "saliency": (*SETS, "--ortho-ratio", "0.1", "--method", "saliency"),
    "streamed": ("--stream", "--method", "spectral", "--ortho-ratio", "0.05"),
}


@pytest.mark.parametrize("way", WAYS)
def test_with_a_key(watch: Watch, way: str, ortho_blocks, caplog) -> None:
    key = ("--ortho-key-file", "key")
    watch.run(*key, "separate", "model", "--out", "split", *WAYS[way], "--json", "report.json")
    secret = load_split("split", key=KEY)
    for words in (
        ("inspect", "split", "--json", "inspect.json"),
        ("eval", "split", "--text", "forget.jsonl", "--json", "eval.json"),
        ("chat", "split", "--prompt", "who is she ?", "--alpha", "1", "--json", "chat.json"),
        ("strip", "split", "--out", "base"),
        ("separate", "model", "--out", "split", *WAYS[way]),  # over the first
    ):
        watch.run(*key, *words)
    watch.run("rotate-key", "split", "--old", "key", "--new", "other")
    watch.run("--ortho-key-file", "other", "inspect", "split")
    # Errors: the wrong key, a damaged stream, and a damaged base beside a whole stream.
    watch.run(*key, "inspect", "split", status=(2,))
    for file, offset in (("ortho.safetensors.enc", -40), ("model.safetensors", -4)):
        content = bytearray(Path("split", file).read_bytes())
        content[offset] ^= 1
        Path("split", file).write_bytes(content)
        watch.run(
            "--ortho-key-file", "other", "eval", "split", "--text", "forget.jsonl", status=(2,)
        )
        with pytest.raises(CheckpointError) as caught:
            load_split("split", key=OTHER)
        watch.said.append("".join(traceback.format_exception(caught.value)))
    watch.said += [caplog.text, repr(secret)]
    files = watch.files()
    assert len(files) > 30
    assert any(path.parent.name.endswith(".enc") for path in files)
    assert ortho_blocks(secret, files) == set()
    assert not any("tensor(" in text for text in watch.said)
    assert not any(KEY.secret.hex() in text or str(KEY.secret) in text for text in watch.said)


@pytest.mark.parametrize("way", ["saliency", "streamed"])
def test_without_a_key_the_search_finds_it(watch: Watch, way: str, ortho_blocks) -> None:
    watch.run("separate", "model", "--out", "split", *WAYS[way])
    secret = load_split("split")
    watch.run("strip", "split", "--out", "base")
    watch.run("encrypt", "split", "--key-file", "key")
    found = {path.parent for path in ortho_blocks(secret, watch.files())}
    assert Path("split", ORTHO).absolute() in found
    # Where it was written before it took its place, and where layers waited; nowhere else.
    names = {path.name for path in found}
    waited = {"000000.safetensors", "000001.safetensors"} if way == "streamed" else set()
    partial = {name for name in names if name.startswith(".0000")}
    assert names - partial == {ORTHO} | waited
    assert all(path.parent.name != "base" for path in found)


def test_serving(watch: Watch, ortho_blocks, monkeypatch, caplog) -> None:
    pytest.importorskip("fastapi")
    httpx2 = pytest.importorskip("httpx2")
    from libortho.serve.app import create_app
    from libortho.serve.audit import AuditLog
    from libortho.serve.engine_transformers import TransformersEngine
    from libortho.serve.gate import Gate
    from libortho.serve.keys import digest
    from libortho.serve.limits import Limits
    from libortho.serve.loading import load_for_serving
    from libortho.serve.policy import parse_policy
    from libortho.serve.run import serving

    key = ("--ortho-key-file", "key")
    watch.run(*key, "separate", "model", "--out", "split", *WAYS["saliency"])
    monkeypatch.setenv(keys.FILE_VARIABLE, "key")
    loaded = load_for_serving(Path("split"))
    assert loaded.ortho == "present"
    limits = Limits(rows=2)
    policy = parse_policy(
        "version = 1\naudit_text = true\n"
        f'[[keys]]\nid = "all"\nsha256 = "{digest("lo-all")}"\nmax_alpha = 1.0\n'
    )
    audit = AuditLog(Path("audit.jsonl"))
    gate = Gate(TransformersEngine(loaded, limits), "tiny", policy, limits, audit, None)
    with serving(create_app(gate, None, None), gate) as url:
        for alpha in (0, 1, 7):
            body = {"model": "tiny", "prompt": "who is she ?", "max_tokens": 4, "alpha": alpha}
            headers = {"authorization": "Bearer lo-all"}
            watch.said.append(httpx2.post(f"{url}/v1/completions", json=body, headers=headers).text)
        for page in ("metrics", "healthz", "v1/models", "openapi.json"):
            watch.said.append(httpx2.get(f"{url}/{page}").text)
    watch.said.append(caplog.text)
    assert "audit.jsonl" in {path.parent.name for path in watch.files()}
    assert ortho_blocks(loaded.model, watch.files()) == set()
    assert not any("tensor(" in text for text in watch.said)
