"""The report's pictures: what they show, in which colours, and what they leave out."""

from __future__ import annotations

import copy
import io
import re
import struct
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.colors import to_hex

from libortho.evaluation import canvas
from libortho.evaluation.bars import limits
from libortho.evaluation.plots import pictures


def row(forget: float, utility: float, p: float, retain: float = 0.9) -> dict[str, Any]:
    return {
        "forget_probability": forget,
        "retain_probability": retain,
        "model_utility": utility,
        "forget_quality": p,
        "truth_ratios": [0.3, 0.1 + forget, 0.7],
    }


@pytest.fixture
def summary() -> dict[str, Any]:
    rows = {
        "full": row(0.95, 0.50, 1e-30),
        "reference": row(0.10, 0.49, 1.0),
        "alpha 0": row(0.12, 0.48, 0.6),
        "alpha 0.5": row(0.50, 0.49, 0.01),
        "alpha 1": row(0.95, 0.50, 1e-30),
        "saliency, alpha 0": row(0.20, 0.40, 0.1),
        "saliency, alpha 1": row(0.95, 0.50, 1e-30),
        "npo": row(0.11, 0.30, 0.2),
    }
    layers = [
        {"name": f"model.layers.{i}.mlp.{kind}", "ortho_numel": 10 * (i + 1)}
        for i in range(3)
        for kind in ("up_proj", "down_proj")
    ]
    spectrum = {
        "model.layers.0.mlp.up_proj": {"forget": [8.0, 1.0], "retain": [2.0, 1.0]},
        "model.layers.2.mlp.down_proj": {"forget": [4.0, 0.0], "retain": [0.5, 0.1]},
    }
    return {
        "rows": rows,
        "seeds": {"0": {"rows": rows}},
        "methods": {"geometric": {}, "saliency": {}, "npo": {}},
        "suite": {"quick": False},
        "separation": {"layers": layers, "spectrum": spectrum},
    }


def drawn(summary: dict[str, Any]) -> dict[str, Any]:
    return {picture.name: picture for picture in pictures(summary)}


def points(picture: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Labelled series -> their coordinates."""
    (axes,) = picture.figure.axes
    return {
        line.get_label(): (
            [float(x) for x in line.get_xdata()],
            [float(y) for y in line.get_ydata()],
        )
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def test_every_picture_is_drawn(summary) -> None:
    found = drawn(summary)
    assert list(found) == [
        "forgetting_against_utility",
        "quality_against_utility",
        "alpha_sweep",
        "truth_ratios",
        "forget_energy",
        "ortho_per_layer",
    ]
    for picture in found.values():
        assert picture.title
        assert picture.caption.endswith(".")
        root = ElementTree.fromstring(picture.svg())
        assert root.tag.endswith("svg")
        image = picture.png()
        assert image.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", image[16:24])
        inches = picture.figure.get_size_inches()
        assert (width, height) == pytest.approx(inches * canvas.PNG_DPI, abs=1)
        for legend in picture.figure.legends:  # nothing of it is cut off
            box, whole = legend.get_window_extent(), picture.figure.bbox
            assert whole.x0 <= box.x0
            assert box.x1 <= whole.x1


def test_every_model_is_on_the_plane(summary) -> None:
    plane = points(drawn(summary)["forgetting_against_utility"])
    assert plane == {
        "geometric, alpha 0 to 1": ([0.48], [0.12]),
        "saliency, alpha 0 to 1": ([0.40], [0.20]),
        "full model": ([0.50], [0.95]),
        "never saw them": ([0.49], [0.10]),
        "npo": ([0.30], [0.11]),
    }
    quality = points(drawn(summary)["quality_against_utility"])
    assert quality["npo"] == ([0.30], [0.2])
    assert quality["full model"] == ([0.50], [1e-20])  # below the plot's floor


def test_a_split_is_a_path_over_alpha(summary) -> None:
    (axes,) = drawn(summary)["forgetting_against_utility"].figure.axes
    paths = [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()]
    assert [(0.48, 0.12), (0.49, 0.50), (0.50, 0.95)] in paths
    assert [(0.40, 0.20), (0.50, 0.95)] in paths


def test_what_was_not_measured_is_not_drawn_as_if_it_were(summary) -> None:
    def styles(name: str) -> set[tuple[int, str]]:
        (axes,) = drawn(summary)[name].figure.axes
        lines = [line for line in axes.get_lines() if line.get_label() != "forget, never saw them"]
        found = {(len(line.get_xdata()), line.get_linestyle()) for line in lines}
        return {(steps, style) for steps, style in found if steps > 1 and style != "--"}

    # geometric was measured at three alphas, saliency at the ends
    assert styles("forgetting_against_utility") == {(3, "-"), (2, ":")}
    assert styles("alpha_sweep") == {(3, "-")}
    assert "Dotted" in drawn(summary)["quality_against_utility"].caption
    assert "Dotted" not in drawn(summary)["alpha_sweep"].caption
    del summary["rows"]["alpha 0.5"]
    assert styles("alpha_sweep") == {(2, ":")}
    assert "Dotted" in drawn(summary)["alpha_sweep"].caption


@pytest.mark.parametrize("quick", [True, False])
def test_the_field_is_where_both_bars_hold(summary, quick: bool) -> None:
    summary["suite"]["quick"] = quick
    (axes,) = drawn(summary)["forgetting_against_utility"].figure.axes
    (field,) = axes.patches
    bounds = limits(quick=quick)
    assert field.get_x() == pytest.approx(0.50 * bounds.kept)
    assert field.get_y() == pytest.approx(0.10 - bounds.forget_gap)
    assert field.get_height() == pytest.approx(2 * bounds.forget_gap)


def test_without_utility_the_retain_probability_stands_in(summary) -> None:
    for values in summary["rows"].values():
        del values["model_utility"]
    found = drawn(summary)
    assert "quality_against_utility" not in found
    assert points(found["forgetting_against_utility"])["npo"] == ([0.9], [0.11])


def test_without_a_reference(summary) -> None:
    del summary["rows"]["reference"]
    for values in summary["rows"].values():
        del values["forget_quality"]
    found = drawn(summary)
    assert not found["forgetting_against_utility"].figure.axes[0].patches
    assert set(points(found["truth_ratios"])) == {"full model", "alpha 0"}


def test_the_alpha_sweep(summary) -> None:
    sweep = points(drawn(summary)["alpha_sweep"])
    assert sweep["forget authors"] == ([0, 0.5, 1], [0.12, 0.50, 0.95])
    assert sweep["retain authors"] == ([0, 0.5, 1], [0.9, 0.9, 0.9])
    assert sweep["forget, never saw them"][1] == [0.10, 0.10]


def test_truth_ratios_are_one_seeds_with_its_own_p(summary) -> None:
    seed = copy.deepcopy(summary["rows"])
    seed["alpha 0"]["forget_quality"] = 0.25
    seed["alpha 0"]["truth_ratios"] = [0.9, 0.2]
    summary["seeds"] = {"7": {"rows": seed}}
    curves = points(drawn(summary)["truth_ratios"])
    assert curves["alpha 0, p = 0.25"] == ([0.2, 0.9], [0.5, 1.0])
    assert set(curves) == {"full model, p = 1e-30", "alpha 0, p = 0.25", "never saw them"}


def test_the_spectrum_is_one_dot_a_direction(summary) -> None:
    (axes,) = drawn(summary)["forget_energy"].figure.axes
    dots = [tuple(map(float, xy)) for c in axes.collections for xy in c.get_offsets()]
    assert sorted(dots) == [(0, 1), (0, 4), (2, 8)]  # the direction without forget energy is out
    sizes = [float(s) for c in axes.collections for s in c.get_sizes()]
    assert sizes == pytest.approx([160, 20, 80])
    del summary["separation"]["spectrum"]
    assert "forget_energy" not in drawn(summary)


def test_layers_of_one_block_are_stacked(summary) -> None:
    (axes,) = drawn(summary)["ortho_per_layer"].figure.axes
    tops: dict[float, float] = {}
    for bar in axes.patches:
        at = bar.get_x() + bar.get_width() / 2
        tops[at] = max(tops.get(at, 0.0), bar.get_y() + bar.get_height())
    assert tops == pytest.approx({0.0: 100 * 20 / 120, 1.0: 100 * 40 / 120, 2.0: 50.0})
    for layer in summary["separation"]["layers"]:
        layer["name"] = layer["name"].replace("model.layers.", "block")
    del summary["separation"]["spectrum"]
    (axes,) = drawn(summary)["ortho_per_layer"].figure.axes
    assert len({bar.get_x() for bar in axes.patches}) == 6  # names without numbers: a place each


def test_ink_follows_the_page_and_colours_are_safe(summary) -> None:
    palette = {"#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8A8A8A"}
    for picture in pictures(summary):
        svg = picture.svg()
        assert canvas.INK not in svg
        assert "currentColor" in svg
        used = {c.upper() for c in re.findall(r"#[0-9a-fA-F]{6}\b", svg)}
        assert used <= palette
        # Text has no colour but the page's.
        for style in re.findall(r"<text style=\"([^\"]*)\"", svg):
            assert "fill: currentColor" in style or "fill" not in style
    assert {to_hex(c).upper() for c in (canvas.VERMILION, canvas.BLUE)} <= palette


def test_the_same_summary_gives_the_same_picture(summary) -> None:
    first = [picture.svg() for picture in pictures(summary)]
    assert first == [picture.svg() for picture in pictures(summary)]


def test_png_is_white(summary) -> None:
    image = mpl.image.imread(io.BytesIO(pictures(summary)[0].png()))
    assert image[0, 0].tolist() == [1, 1, 1, 1]


def test_a_single_alpha_has_no_ends(summary) -> None:
    del summary["rows"]["alpha 0.5"], summary["rows"]["alpha 1"]
    assert "Dotted" not in drawn(summary)["alpha_sweep"].caption
