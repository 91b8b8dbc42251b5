"""A tokenizer's part of a GGUF file: byte-level BPE, as far as llama.cpp splits text alike."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPLITTERS: dict[str, tuple[str, ...]] = {
    "gpt-2": ("ByteLevel regex",),
    "smollm": ("Digits", "ByteLevel regex"),
    "llama-bpe": (f"Split {CONTRACTIONS}{WORDS}" + r"\p{N}{1,3}" + REST, "ByteLevel"),
    "qwen2": (f"Split {CONTRACTIONS}{WORDS}" + r"\p{N}" + REST, "ByteLevel"),
}
"""llama.cpp's name of a text splitter -> the steps of the tokenizers library that it equals."""


def add_tokenizer(gguf: Any, writer: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Write a tokenizer's tokens, merges and settings.

    Args:
        gguf: the package.
        writer: its `GGUFWriter`.
        tokenizer: a fast one.
        size: rows of the model's embedding; tokens that the tokenizer lacks are marked unused.

    Raises:
        TypeError: not a byte-level BPE tokenizer, or none that llama.cpp is known to split alike.
        ValueError: it has more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(
            f"{type(tokenizer).__name__} is no fast tokenizer: this export reads those only"
        )
    spec = json.loads(backend.to_str())
    splitter = splitter_of(spec)
    model = spec["model"]
    by_id = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(by_id, gguf.TokenType.NORMAL)
    for added in spec["added_tokens"]:
        by_id[added["id"]] = added["content"]
        control = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        kinds[added["id"]] = control
    if max(by_id) >= size:
        raise ValueError(f"the tokenizer has token {max(by_id)}, and the model {size} tokens")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in range(size)])
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    )
    writer.add_add_space_prefix(False)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    empty = tokenizer("").input_ids
    if empty not in ([], [tokenizer.bos_token_id]):
        raise TypeError(
            f"the tokenizer adds {empty} to every text: expected nothing or the BOS token"
        )
    writer.add_add_bos_token(bool(empty))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def splitter_of(spec: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer (its JSON) splits text before the merges.

    Raises:
        TypeError: it is no byte-level BPE, or splits in a way that is not in `SPLITTERS`.
    """
    model = spec["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or "merges" not in model:
        raise TypeError(
            f"a {model['type']} tokenizer: expected byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM)"
        )
    pre = spec["pre_tokenizer"] or {}
    steps = tuple(_step(part) for part in pre.get("pretokenizers", [pre] if pre else []))
    normalizer = (spec["normalizer"] or {}).get("type")
    for name, known in SPLITTERS.items():
        # llama.cpp has no NFC; on text that is in NFC already, and most is, it changes nothing.
        if steps == known and (normalizer is None or (normalizer, name) == ("NFC", "qwen2")):
            return name
    raise TypeError(
        f"the tokenizer splits text by {' then '.join(steps) or 'nothing'} (normalizer: "
        f"{normalizer}), which is none of those that llama.cpp is known to share: "
        + ", ".join(SPLITTERS)
    )


def _step(part: dict[str, Any]) -> str:
    kind = part["type"]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return "ByteLevel regex" if part["use_regex"] else "ByteLevel"
    if kind == "Digits" and part["individual_digits"]:
        return "Digits"
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return f"Split {part['pattern'].get('Regex')}"
    return json.dumps(part)
