"""The figures of docs/recipes.md: drawn from the trainer's functions, up to date, small."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megad2v.config.load import load_config, recipes
from megad2v.training.loop import _rates
from tools import plot_schedules

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = REPOSITORY / "docs" / "figures"
RECIPES = sorted(recipes())


@pytest.mark.parametrize("recipe", RECIPES)
def test_figures_are_what_the_tool_draws(recipe: str) -> None:
    path = FIGURES / f"schedule_{recipe}.svg"
    assert path.read_text() == plot_schedules.figure(recipe, load_config(recipe)), "tools/plot_schedules.py draws anew"
    assert path.stat().st_size < 60_000


@pytest.mark.parametrize("recipe", RECIPES)
def test_curves_are_those_of_the_trainer(recipe: str) -> None:
    """Both by the loop's own function; and the corners are among the points."""
    config = load_config(recipe)
    updates = plot_schedules.drawn_updates(config)
    rates, decays, weight_decays = (curve.values for curve in plot_schedules.curves(config, updates))
    assert list(zip(rates, decays, strict=True)) == [_rates(config, update) for update in updates]
    assert set(weight_decays) == {config.optimizer.weight_decay}
    warmup, last = config.schedule.warmup_steps, config.train.steps - 1
    assert {0, warmup - 1, warmup, last} <= set(updates)


def test_lines_go_where_the_values_are() -> None:
    """The learning rate's line starts at the bottom left, has the peak at the top, and ends near the bottom right."""
    tree = ElementTree.fromstring(plot_schedules.figure("x", load_config("vision_base")))
    line = tree.findall("{http://www.w3.org/2000/svg}polyline")[0].get("points", "").split()
    points = [tuple(map(float, point.split(","))) for point in line]
    left, top = plot_schedules.LEFT, plot_schedules.TOP
    assert points[0] == (left, top + plot_schedules.HEIGHT)
    assert min(y for _, y in points) == top
    assert points[-1] == pytest.approx((left + plot_schedules.WIDTH, top + plot_schedules.HEIGHT), abs=1.0)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path)]
    assert plot_schedules.main([*arguments, "--config", "vision_tiny"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["schedule_vision_tiny.svg"]
    assert plot_schedules.main([*arguments, "--config", "vision_bsae"]) == 2
    assert "did you mean vision_base?" in capsys.readouterr().err


def test_docs_have_every_recipe_and_its_figure() -> None:
    text = (REPOSITORY / "docs" / "recipes.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) == set(RECIPES)
    assert set(re.findall(r"figures/schedule_(\w+)\.svg", text)) == set(RECIPES)
