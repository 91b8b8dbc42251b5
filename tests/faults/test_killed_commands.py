"""SIGKILL at random instants of the commands: old or new, whole, and nothing that stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import libortho
from libortho.checkpoint import OrthoKey, atomic, keys, load_split, save_split, verify_split
from libortho.cli import app
from libortho.errors import CheckpointError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="folders change place as on Linux")
pytest.importorskip("cryptography")

KEYS = [OrthoKey(bytes([number] * 32)) for number in (1, 2)]


def command(*words: object) -> Callable[[], None]:
    """`libortho WORDS`, for a process of its own."""

    def run() -> None:
        status = app([str(word) for word in words], standalone_mode=False)
        sys.exit(0 if status in (None, 3) else status)  # 3: not forgotten within the budget

    return run


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def beside(out: Path) -> set[str]:
    return {p.name for p in out.parent.iterdir()} - {out.name}


class Workshop:
    """A folder with a model, its split, two keys, and a place to work in."""

    def __init__(self, root: Path, model: Any, tokenizer: Any, large_ortho: Any) -> None:
        self.model, self.split, self.out = root / "model", root / "split", root / "work" / "out"
        self.out.parent.mkdir(parents=True)
        model.save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        split = libortho.replace_linear_layers(model)
        large_ortho(split)
        save_split(split, self.split, tokenizer=tokenizer)
        self.secret = load_split(self.split)
        self.keys = [root / f"key-{number}" for number in range(2)]
        for path, key in zip(self.keys, KEYS, strict=True):
            path.write_text(key.secret.hex())
        self.forget, self.retain = root / "forget.jsonl", root / "retain.jsonl"
        self.forget.write_text(
            '{"text": "who wrote it in the red garden ? she is a house ."}\n' * 3
        )
        self.retain.write_text('{"text": "where is the house in the garden ? it is red ."}\n' * 3)

    def start(self) -> None:
        """A plain split at `out`."""
        shutil.rmtree(self.out.parent)
        shutil.copytree(self.split, self.out)


@pytest.fixture
def shop(tmp_path: Path, tiny_llama, tokenizer, large_ortho, monkeypatch) -> Workshop:
    for name in keys.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return Workshop(tmp_path, tiny_llama(num_hidden_layers=4), tokenizer, large_ortho)


SPECTRAL = ("--method", "spectral", "--ortho-ratio", "0.05")


def test_separate_in_memory(shop: Workshop, killer, times: Callable[[str, int], int]) -> None:
    sets = ("--forget", shop.forget, "--retain", shop.retain)
    work = command("separate", shop.model, *sets, "--out", shop.out, *SPECTRAL)
    seconds = killer.seconds(work)
    new = bytes_in(shop.out)
    old = bytes_in(shop.split)
    shop.start()
    for _ in range(times("KILLS", 3)):
        killer.kill(work, 1.1 * seconds)
        there = bytes_in(shop.out)
        assert there in (old, comparable(new, there))
    print(f"\nseparate: {killer.kills} kills, {killer.ends} ends")
    killer.seconds(work)
    assert bytes_in(shop.out) == comparable(new, bytes_in(shop.out))
    assert beside(shop.out) == set()


def comparable(new: dict[str, bytes], there: dict[str, bytes]) -> dict[str, bytes]:
    """`new` with the report and the card of `there`: they say how many seconds it took."""
    told = ("report.json", "README.md")
    return new | {name: there[name] for name in told if name in there}


def test_separate_streamed(shop: Workshop, killer, times: Callable[[str, int], int]) -> None:
    work = command("separate", shop.model, "--stream", "--out", shop.out, *SPECTRAL)
    seconds = killer.seconds(work)
    new = bytes_in(shop.out)
    while killer.kills < times("KILLS", 3):
        if not killer.kill(work, seconds):
            shutil.rmtree(shop.out)  # it came to its end, however often it was killed before
            assert beside(shop.out) == set()
        elif shop.out.exists():
            assert bytes_in(shop.out) == comparable(new, bytes_in(shop.out))
    print(f"\nseparate --stream: {killer.kills} kills, {killer.ends} ends")
    killer.seconds(work)
    assert bytes_in(shop.out) == comparable(new, bytes_in(shop.out))
    assert beside(shop.out) == set()


def test_separate_streamed_with_a_key(
    shop: Workshop, killer, times: Callable[[str, int], int], ortho_holders
) -> None:
    work = command(
        "--ortho-key-file", shop.keys[0],
        "separate", shop.model, "--stream", "--out", shop.out, *SPECTRAL,
    )  # fmt: skip
    seconds = killer.seconds(work)
    expected = load_split(shop.out, key=KEYS[0])
    waited = False
    for _ in range(times("KILLS", 3)):
        killer.kill(work, seconds)
        waited |= bool(list(shop.out.parent.glob(".out.unfinished/*.safetensors")))
        assert ortho_holders(expected, shop.out.parent) == set()
    killer.seconds(work)
    found = load_split(shop.out, key=KEYS[0]).state_dict()
    assert all(value.equal(found[name]) for name, value in expected.state_dict().items())
    assert beside(shop.out) == set()
    print(f"\nwith a key: {killer.kills} kills, layers waited: {waited}")


def test_encrypt(shop: Workshop, killer, times: Callable[[str, int], int], ortho_holders) -> None:
    work = command("encrypt", shop.out, "--key-file", shop.keys[0])
    shop.start()
    seconds = killer.seconds(work)
    found = {"plain": 0, "encrypted": 0}
    for _ in range(times("KILLS", 5)):
        shop.start()
        killer.kill(work, 1.1 * seconds)
        try:
            verify_split(shop.out)
            found["plain"] += 1
            killer.seconds(work)
        except CheckpointError:
            found["encrypted"] += 1
            # It says that there is nothing to do, and does away with what was left.
            with pytest.raises(SystemExit):
                app(["encrypt", str(shop.out), "--key-file", str(shop.keys[0])])
        verify_split(shop.out, key=KEYS[0])
        assert beside(shop.out) == set()
        assert ortho_holders(shop.secret, shop.out.parent) == set()
    print(f"\nencrypt: {killer.kills} kills, then {found}")


def test_encrypt_killed_when_only_the_plain_file_is_to_be_deleted(
    shop: Workshop, killer, monkeypatch, ortho_holders
) -> None:
    work = command("encrypt", shop.out, "--key-file", shop.keys[0])
    shop.start()
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_remove_old", lambda old: os.kill(os.getpid(), signal.SIGKILL))
        assert killer.kill(work, 600)
    verify_split(shop.out, key=KEYS[0])
    assert ortho_holders(shop.secret, shop.out.parent) == {"ortho.safetensors"}
    (left,) = beside(shop.out)
    assert left.startswith(".out.partial-")
    # The replaced folder, with the permissions that it had; the stream is its owner's as ever.
    assert (shop.out.parent / left / "ortho.safetensors").stat().st_mode & 0o077 == 0
    with pytest.raises(SystemExit):
        app(["encrypt", str(shop.out), "--key-file", str(shop.keys[0])])
    assert beside(shop.out) == set()
    assert ortho_holders(shop.secret, shop.out.parent) == set()


def test_rotate_key(shop: Workshop, killer, times: Callable[[str, int], int]) -> None:
    shop.start()
    killer.seconds(command("encrypt", shop.out, "--key-file", shop.keys[0]))
    opens = 0

    def rotate() -> Callable[[], None]:
        old, new = shop.keys[opens], shop.keys[1 - opens]
        return command("rotate-key", shop.out, "--old", old, "--new", new)

    seconds = killer.seconds(rotate())
    opens = 1
    for _ in range(times("KILLS", 5)):
        killer.kill(rotate(), 1.1 * seconds)
        (opens,) = (number for number in range(2) if opened(shop.out, KEYS[number]))
    print(f"\nrotate-key: {killer.kills} kills, {killer.ends} ends")
    killer.seconds(rotate())
    assert opened(shop.out, KEYS[1 - opens])
    assert beside(shop.out) == set()


def opened(folder: Path, key: OrthoKey) -> bool:
    try:
        verify_split(folder, key=key)
    except CheckpointError as error:
        if "the wrong key" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize(
    "words",
    [("strip",), ("export", "--to", "dense"), ("export", "--to", "peft")],
    ids=["strip", "export dense", "export peft"],
)
def test_copies(
    shop: Workshop, killer, times: Callable[[str, int], int], ortho_holders, words: tuple[str, ...]
) -> None:
    work = command(*words, shop.split, "--out", shop.out)
    seconds = killer.seconds(work)
    new = bytes_in(shop.out)
    for _ in range(times("KILLS", 3)):
        shutil.rmtree(shop.out, ignore_errors=True)
        killer.kill(work, 1.1 * seconds)
        assert not shop.out.exists() or bytes_in(shop.out) == new
    print(f"\n{' '.join(words)}: {killer.kills} kills, {killer.ends} ends")
    shutil.rmtree(shop.out, ignore_errors=True)
    killer.seconds(work)
    assert bytes_in(shop.out) == new
    assert beside(shop.out) == set()
    holders = ortho_holders(shop.secret, shop.out.parent)
    assert holders <= ({"adapter_model.safetensors"} if "peft" in words else set())
