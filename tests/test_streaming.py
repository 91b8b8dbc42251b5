"""Streaming: the same bits as in memory, for every kind of checkpoint, also after a kill."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from libortho import GeometricConfig, SeparationConfig, SpectralConfig, separate_
from libortho.checkpoint import load_split, save_split, verify_split
from libortho.checkpoint.parts import JOURNAL
from libortho.evaluation.finetuned import load_model
from libortho.methods.spectral import spectral_base
from libortho.streaming import SHARD_SIZE, separate_streamed

transformers = pytest.importorskip("transformers")

SAME = ("config.json", "generation_config.json", "ortho.safetensors", "ortho_config.json")


def config(*targets: str, **method: object) -> SeparationConfig:
    return SeparationConfig(
        SpectralConfig(**{"ortho_ratio": 0.05, **method}), target_modules=targets or ("down_proj",)
    )


def in_memory(folder: Path, out: Path, how: SeparationConfig) -> None:
    model = load_model(str(folder))
    separate_(model, [[1, 5, 6, 7]], [[1, 9, 8, 7]], how)
    save_split(model, out, max_shard_size=SHARD_SIZE)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"} | {
        name: (folder / name).read_bytes() for name in SAME if (folder / name).exists()
    }


def assert_same(one: Path, other: Path) -> None:
    first, second = bytes_of(one), bytes_of(other)
    assert first.keys() == second.keys()
    for name, content in first.items():
        assert content == second[name], name


def leftovers(out: Path) -> list[Path]:
    return [p for p in out.parent.iterdir() if p.name.startswith(".")]


def test_every_family_in_shards(family, tmp_path: Path) -> None:
    family.build().save_pretrained(tmp_path / "model", max_shard_size="20kB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    how = config(family.mlp, *family.attention)
    report = separate_streamed(str(tmp_path / "model"), tmp_path / "streamed", how)
    in_memory(tmp_path / "model", tmp_path / "memory", how)
    assert_same(tmp_path / "streamed", tmp_path / "memory")
    found = verify_split(tmp_path / "streamed")
    assert {layer.name for layer in report.layers} == set(found.manifest.layers)
    assert report.reached is None
    assert leftovers(tmp_path / "streamed") == []


@pytest.mark.parametrize(
    "how",
    [
        config("q_proj", base=spectral_base("fp16"), selection="magnitude"),
        config(base=spectral_base("int4", group_size=8), svd="randomized", seed=3),
        config("down_proj", "q_proj", rank_ratio={"down_proj": 0.5, "q_proj": 0.9}),
    ],
    ids=["fp16", "int4", "ratios"],
)
def test_settings(tiny_llama: Callable[..., nn.Module], tmp_path: Path, how) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    separate_streamed(str(tmp_path / "model"), tmp_path / "streamed", how)
    in_memory(tmp_path / "model", tmp_path / "memory", how)
    assert_same(tmp_path / "streamed", tmp_path / "memory")


def test_experts_that_are_stored_in_another_form(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "vocab_size": 61, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    model.save_pretrained(tmp_path / "model")
    separate_streamed(str(tmp_path / "model"), tmp_path / "streamed", config("o_proj"))
    in_memory(tmp_path / "model", tmp_path / "memory", config("o_proj"))
    assert_same(tmp_path / "streamed", tmp_path / "memory")
    assert load_split(tmp_path / "streamed")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


class Killed(BaseException):
    """Stands for a signal that nothing can catch."""


def test_finished_layers_are_not_done_again(tiny_llama, tmp_path, monkeypatch) -> None:
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    import libortho.streaming as streaming

    plain, done = streaming.split_one, []

    def counting(source, name, *rest):
        if len(done) == 2:
            raise Killed
        done.append(name)
        return plain(source, name, *rest)

    monkeypatch.setattr(streaming, "split_one", counting)
    model, out = str(tmp_path / "model"), tmp_path / "streamed"
    with pytest.raises(Killed):
        separate_streamed(model, out, config())
    assert not out.exists()
    done.append("killed")
    told: list[tuple[str, int, int]] = []
    separate_streamed(model, out, config(), progress=lambda *what: told.append(what))
    in_memory(tmp_path / "model", tmp_path / "memory", config())
    assert done == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)] + ["killed"] + [
        f"model.layers.{i}.mlp.down_proj" for i in (2, 3)
    ]
    assert told[0] == ("split layers", 2, 4)
    assert_same(out, tmp_path / "memory")
    assert leftovers(out) == []


def test_out_may_be_a_link_to_another_disk(tiny_llama, tmp_path, monkeypatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    disk = tmp_path / "disk"
    (disk / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(disk / "real")
    plain = os.rename

    def rename(old, new) -> None:
        if (disk in Path(old).parents) != (disk in Path(new).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link", old, None, new)
        plain(old, new)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr("libortho.checkpoint.atomic._exchange", lambda *_: False)
    separate_streamed(str(tmp_path / "model"), tmp_path / "link", config())
    verify_split(disk / "real")
    assert leftovers(tmp_path / "link") == leftovers(disk / "real") == []


def slowly(model: str, out: Path, log: Path) -> None:
    """Split a model, a while for each layer, and log which have been begun."""
    import libortho.streaming as streaming

    torch.set_num_threads(1)
    plain = streaming.split_one

    def slow(source, name, *rest):
        with log.open("a") as file:
            file.write(f"{name}\n")
        time.sleep(0.3)
        return plain(source, name, *rest)

    streaming.split_one = slow
    separate_streamed(model, out, config())


def test_a_killed_process_goes_on(tiny_llama, tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=6).save_pretrained(tmp_path / "model")
    out, folder, logs = tmp_path / "out", tmp_path / ".out.unfinished", tmp_path / "logs"
    logs.mkdir()

    def process(log: str) -> multiprocessing.Process:
        # Forked: a new interpreter would take longer to import than all of this test.
        context = multiprocessing.get_context("fork")
        made = context.Process(target=slowly, args=(str(tmp_path / "model"), out, logs / log))
        made.start()
        return made

    first, end = process("first"), time.monotonic() + 60
    while len(list(folder.glob("*.safetensors"))) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    first.kill()
    first.join()
    kept = list(folder.glob("*.safetensors"))
    assert first.exitcode == -signal.SIGKILL
    assert 3 <= len(kept) < 6
    assert not out.exists()
    assert all(os.stat(p).st_mode & 0o077 == 0 for p in (folder, *kept))
    second = process("second")
    second.join()
    assert second.exitcode == 0
    begun, again = ((logs / x).read_text().split() for x in ("first", "second"))
    assert again == [f"model.layers.{i}.mlp.down_proj" for i in range(len(kept), 6)]
    assert set(begun[: len(kept)]).isdisjoint(again)
    in_memory(tmp_path / "model", tmp_path / "memory", config())
    assert_same(out, tmp_path / "memory")
    assert leftovers(out) == []


def test_waiting_layers_of_other_settings_are_refused(tiny_llama, tmp_path, monkeypatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    import libortho.streaming as streaming

    def killed(*arguments: object, **named: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "save_split", killed)
        with pytest.raises(Killed):
            separate_streamed(str(tmp_path / "model"), tmp_path / "out", config())
    with pytest.raises(ValueError, match="unfinished split of another model, or with other set"):
        separate_streamed(str(tmp_path / "model"), tmp_path / "out", config(ortho_ratio=0.1))
    tiny_llama(vocab_size=80).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="unfinished split of another model"):
        separate_streamed(str(tmp_path / "model"), tmp_path / "out", config())
    folder = tmp_path / ".out.unfinished"
    (folder / JOURNAL).write_text("[]")
    with pytest.raises(ValueError, match=r"journal\.json: holds list"):
        separate_streamed(str(tmp_path / "model"), tmp_path / "out", config())


def test_what_is_refused(tiny_llama, tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    model, out = str(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"'geometric' runs the whole model.* can: 'spectral'"):
        separate_streamed(model, out, SeparationConfig(GeometricConfig()))
    with pytest.raises(ValueError, match="matches no module"):
        separate_streamed(model, out, config("nothing"))
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens"):
        separate_streamed(model, out, config("lm_head"))
    with pytest.raises(ValueError, match="does not divide the 32 input features"):
        separate_streamed(model, out, config("q_proj", base=spectral_base("int4")))
    (out / "thesis").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="not empty and not a split checkpoint"):
        separate_streamed(model, out, config())
    assert leftovers(out) == []


def test_a_layer_with_nan_is_named(tiny_llama, tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight[3, 2] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight holds 1 NaN"):
        separate_streamed(str(tmp_path / "model"), tmp_path / "out", config())
    assert not (tmp_path / "out").exists()
