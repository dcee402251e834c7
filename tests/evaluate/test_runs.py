"""Metrics to panels to one PNG."""

from __future__ import annotations

import io

from PIL import Image

from encore.evaluate.report import Panel, curves_png, panels_png
from encore.evaluate.runs import run_panels


def test_a_panel_for_each_figure_and_a_line_for_each_run_that_has_it() -> None:
    both = [
        {"step": 0, "validation_loss": 9.0},
        {"step": 1, "loss": 4.0, "gradient_norm": 2.0, "gradient_norm_encoder": 1.0},
        {"step": 2, "loss": None, "gradient_norm": 1.0, "gradient_norm_encoder": 0.5},  # not finite
    ]
    alone = [{"step": 1, "loss": 3.0, "gradient_norm": 5.0}]
    panels = {panel.title: panel for panel in run_panels({"a": both, "b": alone})}
    assert list(panels) == ["Loss", "Validation loss", "Gradients", "Gradients of the encoder"]
    assert panels["Loss"].curves == {"a": [(1, 4.0)], "b": [(1, 3.0)]}
    assert panels["Validation loss"].curves == {"a": [(0, 9.0)]}
    assert panels["Gradients of the encoder"].curves == {"a": [(1, 1.0), (2, 0.5)]}
    assert panels["Gradients"].log_y and not panels["Loss"].log_y


def test_panels_stand_side_by_side_and_a_run_keeps_its_colour() -> None:
    one = Panel("One", "step", "loss", {"a": [(0, 1.0), (1, 2.0)], "b": [(0, 2.0), (1, 1.0)]})
    two = Panel("Two", "step", "norm", {"b": [(0, 1.0), (1, 1.0)]}, log_y=True)

    def size_and_colours(png: bytes) -> tuple[tuple[int, int], set[tuple[int, ...]]]:
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        return picture.size, {colour for _, colour in picture.getcolors(1 << 24) or []}

    blue, orange = (31, 119, 180), (255, 127, 14)
    (width, height), colours = size_and_colours(panels_png([one, two, two]))
    (single_width, single_height), alone = size_and_colours(curves_png("Two", "step", "norm", two.curves))
    assert (width, height) == (2 * single_width, 2 * single_height)
    assert {blue, orange} <= colours and blue in alone and orange not in alone
    picture = Image.open(io.BytesIO(panels_png([one, two]))).convert("RGB")
    right = picture.crop((single_width, 0, 2 * single_width, single_height))
    found = {colour for _, colour in right.getcolors(1 << 24) or []}
    assert orange in found and blue not in found
