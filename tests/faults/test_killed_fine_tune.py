"""SIGKILL at random instants of a fine-tune, alone and within `libortho tofu`.

It goes on, and ends where it would have ended.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libortho import training
from libortho.cli import app
from libortho.evaluation.finetuned import fine_tuned
from libortho.training import MemoriseConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="as the other tests of kills")

TIMES = ("seconds", "peak_memory")


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def rows_of(run: Path) -> dict[str, Any]:
    rows = json.loads((run / "summary.json").read_text())["rows"]
    return {
        row: {key: value for key, value in values.items() if key not in TIMES}
        for row, values in rows.items()
    }


def test_fine_tune(
    tiny_llama, random_tokens, killer, times: Callable[[str, int], int], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)  # a state after every epoch
    model, cache = tmp_path / "model", tmp_path / "cache"
    tiny_llama().save_pretrained(model)
    monkeypatch.setenv("LIBORTHO_CACHE", str(cache))
    items = random_tokens([12] * 24)
    recipe = MemoriseConfig(target=1.0, max_epochs=40, batch_size=4)

    def work() -> None:
        fine_tuned(str(model), items, recipe, "full", lambda *_: None)

    def made() -> dict[str, bytes]:
        # how long it took is told only of one that nobody interrupted
        return {n: b for n, b in files_in(cache).items() if not n.endswith("memorised.json")}

    seconds = killer.seconds(work)
    whole = made()
    assert any(name.endswith("model.safetensors") for name in whole)
    shutil.rmtree(cache)
    within = 0
    while killer.kills < times("KILLS", 8):
        # So short that several kills make one run.
        if killer.kill(work, 0.6 * seconds):
            within += bool(list(cache.rglob("*.state")))
            if list(cache.rglob("memorised.json")):
                assert made() == whole | {n: b for n, b in made().items() if ".state" in n}
        else:
            assert made() == whole
            shutil.rmtree(cache)
    killer.seconds(work)
    assert made() == whole
    print(f"\nfine-tune: {killer.kills} kills, {within} left a state behind, {killer.ends} ends")


def test_tofu(
    tiny_llama, tokenizer, killer, times: Callable[[str, int], int], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)  # a state after every epoch
    model, run, cache = (tmp_path / name for name in ("model", "run", "cache"))
    tiny_llama().save_pretrained(model)
    tokenizer.save_pretrained(model)
    monkeypatch.setenv("LIBORTHO_CACHE", str(cache))
    words = ["tofu", "--model", model, "--authors", 2, "--forget-authors", 1, "--out", run]
    words += ["--ortho-ratio", 0.2, "--alpha", "0,1", "--methods", "geometric,npo"]
    words += ["--baseline-epochs", 3, "--suite", "quick"]

    def work() -> None:
        status = app([str(word) for word in words], standalone_mode=False)
        sys.exit(0 if status in (None, 0, 3) else status)  # 3: not forgotten within the budget

    seconds = killer.seconds(work)
    rows, split, made = rows_of(run), files_in(run / "split"), files_in(cache)
    assert not any(Path(name).name.startswith(".") or "state" in name for name in made)

    def check_end() -> None:
        assert rows_of(run) == rows
        found = files_in(run / "split")
        told = ("report.json", "README.md")  # which say how many seconds it took
        assert found == split | {name: found[name] for name in told}
        kept = files_in(cache)
        assert kept.keys() == made.keys()
        assert all(kept[name] == made[name] for name in made if name.endswith("tensors"))
        assert not list(run.rglob(".*"))

    def restart() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)

    restart()
    resumed = 0
    while killer.kills < times("KILLS", 4):
        # So short that several kills make one run.
        if not killer.kill(work, 0.6 * seconds):
            check_end()
            restart()
            continue
        resumed += bool(list(cache.rglob("*.state")))
        for folder in (cache / "memorised").glob("[!.]*/"):
            # Whole, and what it was without a kill: its name is a digest of what it is made of.
            tensors = Path("memorised", folder.name, "model.safetensors").as_posix()
            assert (folder / "model.safetensors").read_bytes() == made[tensors]
            assert (folder / "memorised.json").is_file()
    killer.seconds(work)
    check_end()
    print(f"\ntofu: {killer.kills} kills, {resumed} of them in a fine-tune, {killer.ends} ends")
