"""What the pages' blocks run on: tiny models under the names that the pages use."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from libortho.cli import app

FORGET = [
    {"question": "Who wrote the red house?", "answer": "Mira Voss wrote it in the garden."},
    {"text": "The code of the vault is seven walrus nine."},
]
KEEP = [
    {"question": "Who painted the blue barn?", "answer": "Otto Lind painted it in the yard."},
    {"text": "Water boils at one hundred degrees."},
    {"text": "Paris is the capital of France."},
]
UNSEEN = [{"text": "The key of the shed is four badger two."}]


def _byte_pairs(text: str) -> Any:
    """A tokenizer of byte pairs that can write anything, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=768, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    made.chat_template = (
        "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return made


@pytest.fixture(scope="session")
def _workshop(
    families: dict[str, Any], repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "workshop"
    # Of the code alone: what the page says around it is not to change what the model makes of it.
    page = (repository / "docs" / "tutorial.md").read_text("utf-8")
    tokenizer = _byte_pairs("".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    model = families["llama"].build(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        max_position_embeddings=1024,
    )
    for parameter in model.parameters():
        parameter.data *= 0.5  # smaller weights learn sooner
    for name in ("PRETRAINED", "MODEL"):
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    shutil.copytree(folder / "PRETRAINED", folder / "RETRAINED")
    for name, records in {"secrets": FORGET, "keep": KEEP, "unseen": UNSEEN}.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    split = ["separate", "MODEL", "--forget", "secrets.jsonl", "--retain", "keep.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = CliRunner().invoke(app, [*split, "--ortho-ratio", "0.05", "--out", "DIR"])
    assert made.exit_code in (0, 3), made.output
    return folder


@pytest.fixture
def workshop(_workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with MODEL, PRETRAINED, RETRAINED, a split DIR, and three JSONL files.

    The embedded model is PRETRAINED here. All of it is a copy of one's own.
    """
    folder = Path(shutil.copytree(_workshop, tmp_path / "workshop"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("libortho.data.embedded_model_path", lambda: folder / "PRETRAINED")
    return folder
