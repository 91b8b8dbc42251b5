"""Models that accelerate has spread out: partly on disk, and over two pretended devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

from libortho import (
    BaseConfig,
    CurvatureConfig,
    GeometricConfig,
    SaliencyConfig,
    SeparationConfig,
    SpectralConfig,
    separate_,
)
from libortho.checkpoint import load_split, save_split
from libortho.devices import check_device_map, device_of, offloaded, weights_here
from libortho.evaluation.finetuned import load_model
from libortho.kernels.reference import unpack_int4
from libortho.scoring import sequence_nll

pytest.importorskip("accelerate")

INT4 = BaseConfig("int4", group_size=32)
METHODS = {
    "descent": GeometricConfig(ortho_ratio=0.2, target_nll=5.0, find_steps=2, fit_steps=2),
    "projection": GeometricConfig(edit="projection", ortho_ratio=0.2, target_nll=5.0),
    "saliency": SaliencyConfig(ortho_ratio=0.1, target_nll=5.0, steps=2),
    "saliency in INT4": SaliencyConfig(ortho_ratio=0.1, target_nll=5.0, steps=2, base=INT4),
    "descent in INT4": GeometricConfig(
        ortho_ratio=0.2, target_nll=5.0, find_steps=2, fit_steps=2, base=INT4
    ),
    "curvature": CurvatureConfig(ortho_ratio=0.2),
    "spectral": SpectralConfig(ortho_ratio=0.05),
}
PARTS = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
MAPS = {
    "a layer on disk": dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"},
    "all on disk": {"": "disk"},
}


@pytest.fixture
def model(tiny_llama, tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def files(folder: Path) -> dict[str, bytes]:
    names = ("model.safetensors", "ortho.safetensors", "config.json", "ortho_config.json")
    return {name: (folder / name).read_bytes() for name in names}


def split(model: nn.Module, items: list[Any], method: Any) -> None:
    separate_(model, items[:3], items[3:], SeparationConfig(method, general_text=False))


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_is_partly_on_disk_gives_the_same_split(
    model: Path, tmp_path: Path, random_tokens, where: str, name: str
) -> None:
    items = random_tokens([12, 9, 14, 20, 17, 11, 23, 8])
    for label, device_map in (("whole", None), ("spread", MAPS[where])):
        loaded = load_model(str(model), device_map)
        assert any(p.is_meta for p in loaded.parameters()) is (label == "spread")
        split(loaded, items, METHODS[name])
        save_split(loaded, tmp_path / label, stored=offloaded(loaded))
    assert files(tmp_path / "whole") == files(tmp_path / "spread")


def test_a_failure_leaves_a_spread_model_as_it_was(model: Path, random_tokens, monkeypatch) -> None:
    items = random_tokens([12, 9, 14, 20])
    loaded = load_model(str(model), MAPS["a layer on disk"])
    before = torch.cat(sequence_nll(loaded, items))

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("libortho.separate._measure", fail)
    with pytest.raises(RuntimeError, match="no"):
        split(loaded, items, METHODS["projection"])
    assert torch.equal(torch.cat(sequence_nll(loaded, items)), before)


def test_a_rehearsal_needs_the_whole_earlier_model(model: Path, random_tokens) -> None:
    items = random_tokens([12, 9, 14, 20])
    before = load_model(str(model), MAPS["a layer on disk"])
    method = GeometricConfig(ortho_ratio=0.2)
    config = SeparationConfig(method, general_text=False)
    with pytest.raises(ValueError, match=r'a rehearsal is a fine-tune .*earlier="show"'):
        separate_(load_model(str(model)), items[:2], items[2:], config, before=before)


def test_where_a_module_computes(model: Path) -> None:
    loaded = load_model(str(model), MAPS["a layer on disk"])
    layer = loaded.get_submodule("model.layers.1.mlp.down_proj")
    assert layer.weight.is_meta
    assert device_of(layer) == torch.device("cpu")
    with weights_here(layer):
        assert not layer.weight.is_meta
    assert layer.weight.is_meta
    assert "model.layers.1.mlp.down_proj.weight" in offloaded(loaded)
    assert offloaded(load_model(str(model))) == {}


def test_a_split_is_loaded_onto_devices(model: Path, tmp_path: Path, random_tokens) -> None:
    items = random_tokens([12, 9, 14, 20, 17])
    loaded = load_model(str(model))
    split(loaded, items, METHODS["projection"])
    save_split(loaded, tmp_path / "split")
    whole = load_split(tmp_path / "split")
    spread = load_split(tmp_path / "split", device_map="cpu")
    for one, other in zip(sequence_nll(whole, items), sequence_nll(spread, items), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="device='cpu' and device_map='auto': give one"):
        load_split(tmp_path / "split", device="cpu", device_map="auto")


def test_names_of_device_maps() -> None:
    for name in ("auto", "balanced", "sequential", "cpu", "cuda:1"):
        assert check_device_map(name) == name
    with pytest.raises(ValueError, match="--device-map 'many': expected auto"):
        check_device_map("many")


# -- two devices -----------------------------------------------------------------

# "lazy" is a device type that torch knows everywhere and that computes nothing by itself.
ONE, TWO = torch.device("lazy:0"), torch.device("lazy:1")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
INDEXES = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


class Placed(Tensor):
    """A tensor of the CPU that says it is on another device, and meets those of that one alone."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Placed:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: Any) -> Any:
    """Do it on the CPU; an error where tensors of two devices meet, as on real ones."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    if function in INDEXES:  # by indices of the CPU, as on a GPU
        tensors = [x for x in tensors if isinstance(x, Placed)]
    met = {x.device for x in tensors if isinstance(x, Placed) or x.dim() > 0}
    if function not in MOVES and len(met) > 1:
        raise RuntimeError(f"{function} of tensors on {sorted(map(str, met))}")
    asked = kwargs.pop("device", None)
    device = torch.device(asked) if asked is not None else next(iter(met), torch.device("cpu"))
    if function is torch.ops.aten.copy_.default:
        device = args[0].device
    plain = tree_map_only(Placed, lambda x: x.inner, (args, kwargs))
    found = function(*plain[0], **plain[1])
    if function in READS or device.type != "lazy":
        return found
    found = tree_map_only(Tensor, lambda x: Placed(x, device), found)
    return return_and_correct_aliasing(function, args, kwargs, found)


class Factories(TorchDispatchMode):
    """New tensors of a pretended device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        placed = any(isinstance(x, Placed) for x in tree_flatten((args, kwargs))[0])
        asked = kwargs.get("device")
        if placed or (asked is not None and torch.device(asked).type == "lazy"):
            return run(function, args, kwargs)
        return function(*args, **kwargs)


def place(module: nn.Module, device: torch.device) -> None:
    """Move a module; its inputs are brought there, and its output back, as accelerate does it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    class Here(AlignDevicesHook):
        def init_hook(self, module: nn.Module) -> nn.Module:
            return module

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                held = parameter.detach()
                moved = Placed(held.inner if isinstance(held, Placed) else held, device)
                part._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Placed(buffer, device)
    add_hook_to_module(module, Here(device, io_same_device=isinstance(module, nn.Linear)))


@pytest.fixture
def two_devices() -> Iterator[None]:
    with Factories():
        yield


def test_tensors_of_two_devices_may_not_meet(two_devices) -> None:
    one, two = (Placed(torch.ones(2, 2), device) for device in (ONE, TWO))
    assert (one @ one).device == ONE
    assert (one.to(TWO) + two).device == TWO
    assert torch.zeros(2, device=TWO).device == TWO
    for other in (two, torch.ones(2, 2)):
        with pytest.raises(RuntimeError, match="of tensors on"):
            one + other


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("within", [False, True], ids=["by block", "within a block"])
def test_no_tensors_of_two_devices_meet(
    two_devices, model: Path, random_tokens, name: str, within: bool
) -> None:
    """Blocks on two devices; or, worse, the split layers on another one than their block."""
    items = random_tokens([12, 9, 14, 20, 17, 11])
    plain, spread = load_model(str(model)), load_model(str(model))
    for part in PARTS:
        place(spread.get_submodule(part), ONE)
    last = spread.get_submodule("model.layers.1")
    place(last, ONE if within else TWO)
    if within:
        place(last.get_submodule("mlp.down_proj"), TWO)
    for loaded in (plain, spread):
        split(loaded, items, METHODS[name])
    layers = [loaded.get_submodule("model.layers.1.mlp.down_proj") for loaded in (plain, spread)]
    assert layers[1].base.qdata.device == TWO
    assert layers[1].ortho.tensors[0].device == TWO
    # Other kernels, another order of sums: a code may end on the other side of a half.
    codes = [layers[0].base.qdata, layers[1].base.qdata.inner]
    if codes[0].dtype == torch.uint8:
        codes = [unpack_int4(packed) for packed in codes]
    codes = [code.int() for code in codes]
    assert (codes[0] - codes[1]).abs().max() <= 1
