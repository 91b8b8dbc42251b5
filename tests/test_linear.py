"""Selecting layers: every name is found or refused by name, and nothing shared is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from libortho import OrthoLinear, replace_linear_layers, set_alpha
from libortho.linear import install, matches, read_linear, select_linear
from libortho.measures import untouched_layers

DOWN = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture
def llama(tiny_llama) -> nn.Module:
    return tiny_llama()


# -- which layers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("down_proj", DOWN),
        (["down_proj"], DOWN),
        (("mlp.down_proj",), DOWN),
        ("layers.1.mlp.down_proj", DOWN[1:]),
        (DOWN[0], DOWN[:1]),
        (r".*\.0\.mlp\.(up|down)_proj", ["model.layers.0.mlp.up_proj", DOWN[0]]),
        (r".*\.1\.self_attn\.[qo]_proj", [f"model.layers.1.self_attn.{x}_proj" for x in "qo"]),
        (["down_proj", "lm_head", r".*down_proj"], [*DOWN, "lm_head"]),
    ],
)
def test_selects(llama: nn.Module, targets, names: list[str]) -> None:
    selected = select_linear(llama, targets)
    assert list(selected) == names
    assert all(selected[name] is llama.get_submodule(name) for name in names)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("a.down_proj", "down_proj", True),
        ("a.xdown_proj", "down_proj", False),  # a suffix ends at a dot
        ("a.down_proj.b", "down_proj", False),
        ("down_proj", "down_proj", True),
        ("a.down_proj", "a", False),
        ("a.down_proj", r"a\..*", True),
        ("ba.down_proj", r"a\..*", False),  # a regular expression matches all of a name
    ],
)
def test_matches(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) == expected


def test_nothing_matched(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'dwon_proj'.*down_proj.*gate_proj.*lm_head.*up_proj"):
        select_linear(llama, ["down_proj", "dwon_proj"])
    with pytest.raises(ValueError, match="there are none"):
        select_linear(nn.Sequential(nn.ReLU()), "down_proj")


@pytest.mark.parametrize("targets", [[], ()])
def test_no_target(llama: nn.Module, targets) -> None:
    with pytest.raises(ValueError, match="target_modules is empty"):
        select_linear(llama, targets)


def test_no_regular_expression(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'\(down' is no regular expression"):
        select_linear(llama, "(down")


@pytest.mark.parametrize(
    ("target", "kind"),
    [("embed_tokens", "Embedding"), ("mlp", "LlamaMLP"), ("norm", "LlamaRMSNorm")],
)
def test_a_module_that_is_not_linear(llama: nn.Module, target: str, kind: str) -> None:
    with pytest.raises(
        TypeError, match=rf"model\.\S*{target}, which target_modules names, is a {kind}"
    ):
        select_linear(llama, target)


def test_fused_experts() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    )
    with pytest.raises(TypeError, match=r"'down_proj'.*experts\.down_proj.*\(3, 16, 24\).*leak"):
        select_linear(model, "down_proj")
    assert len(select_linear(model, "o_proj")) == 1
    # and where others are split, they are told of
    untouched = untouched_layers(model)
    assert {"model.layers.0.mlp.experts.down_proj", "model.embed_tokens.weight"} <= set(untouched)
    assert untouched["model.layers.0.mlp.experts.down_proj"].startswith("3 x 16 x 24 of ")


def test_a_linear_layer_that_computes_more() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"a": Doubled(4, 4), "b": nn.Linear(4, 4)})
    with pytest.raises(TypeError, match=r"a, which .*a Doubled, .*something else"):
        select_linear(model, "a")
    assert list(select_linear(model, "b")) == ["b"]


def test_already_split(llama: nn.Module) -> None:
    replace_linear_layers(llama, r".*\.0\.mlp\.down_proj", use_low_rank=False)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj is split already"):
        select_linear(llama, "down_proj")
    assert list(select_linear(llama, DOWN[1])) == DOWN[1:]


# -- what is shared --------------------------------------------------------------


def test_tied_output_head(tiny_llama) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens"):
        select_linear(model, "lm_head")
    assert list(select_linear(model, "down_proj")) == DOWN


def test_tied_linear_layers() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match="a shares its weight with b"):
        select_linear(model, "a")
    # With both as targets nothing keeps what is removed.
    assert list(select_linear(model, ["a", "b"])) == ["a", "b"]


def test_weight_tied_under_another_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "other": nn.Module()})
    model["other"].kernel = model["a"].weight
    with pytest.raises(ValueError, match="a shares its weight with other"):
        select_linear(model, "a")


def test_a_module_in_two_places_is_replaced_in_both(llama: nn.Module, random_tokens) -> None:
    layers = llama.model.layers
    layers[1].mlp.down_proj = layers[0].mlp.down_proj
    weight = layers[0].mlp.down_proj.weight.clone()
    assert list(select_linear(llama, "down_proj")) == DOWN[:1]
    # also where only the second name was given
    assert list(select_linear(llama, DOWN[1])) == DOWN[1:]
    replace_linear_layers(llama, DOWN[1], use_low_rank=False, scale="absmax")
    new = layers[0].mlp.down_proj
    assert isinstance(new, OrthoLinear)
    assert layers[1].mlp.down_proj is new
    assert not any(torch.equal(p, weight) for p in llama.parameters())
    set_alpha(llama, 1.0)
    llama(input_ids=torch.tensor([random_tokens([5])[0].ids]))


def test_install_keeps_the_training_flag_and_the_order() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).train()
    model[2].eval()
    new = nn.Linear(3, 3).eval()
    install(model, {"0": new})
    assert model[0] is new
    assert new.training
    assert [name for name, _ in model.named_children()] == ["0", "1", "2"]


# -- reading weights -------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_reads_linear(bias: bool) -> None:
    linear = nn.Linear(3, 5, bias=bias)
    weight, found = read_linear(linear, "x")
    assert torch.equal(weight, linear.weight)
    assert not weight.requires_grad
    assert (found is not None) == bias
    assert found is None or torch.equal(found, linear.bias)


def test_reads_conv1d_as_out_by_in() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(5, 3)
    weight, bias = read_linear(conv, "x")
    assert weight.shape == (5, 3)
    x = torch.randn(2, 3)
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), conv(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_not_finite(value: float, part: str) -> None:
    linear = nn.Linear(3, 5)
    getattr(linear, part).data.view(-1)[:2] = value
    with pytest.raises(ValueError, match=rf"a\.b\.{part} holds 2 NaN or Inf"):
        read_linear(linear, "a.b")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0)])
def test_no_rows_or_columns(rows: int, columns: int) -> None:
    with pytest.raises(ValueError, match=rf"a\.b is \({rows}, {columns}\)"):
        read_linear(nn.Linear(columns, rows), "a.b")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_quantised_weight(dtype: torch.dtype) -> None:
    linear = nn.Linear(3, 5)
    linear.weight = nn.Parameter(torch.zeros(5, 3, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"a\.b stores its weight as {dtype}"):
        read_linear(linear, "a.b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_weights(dtype: torch.dtype) -> None:
    assert read_linear(nn.Linear(3, 5, dtype=dtype), "x")[0].dtype == dtype


def test_meta_device() -> None:
    with pytest.raises(ValueError, match=r"a\.b has no weights yet"):
        read_linear(nn.Linear(3, 5, device="meta"), "a.b")
    model = nn.ModuleDict({"a": nn.Linear(3, 5, device="meta"), "b": nn.Linear(3, 5)})
    with pytest.raises(ValueError, match="a has no weights yet"):
        replace_linear_layers(model, ["a", "b"], use_low_rank=False)
    assert isinstance(model["b"], nn.Linear)


def test_wrong_kind() -> None:
    with pytest.raises(TypeError, match=r"a\.b is a Embedding.*Linear"):
        read_linear(nn.Embedding(3, 5), "a.b")
