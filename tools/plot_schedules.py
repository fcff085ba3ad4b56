#!/usr/bin/env python3
"""Draw what changes over a run (learning rate, the teacher's decay, weight decay) from the functions that the trainer
calls: one SVG a recipe, text, the same bytes wherever it is drawn.

    python tools/plot_schedules.py --output docs/figures                       # every recipe of the package
    python tools/plot_schedules.py --config mine.yaml --output figures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed

from megad2v.config.load import load_config, recipes
from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.teacher.schedule import decay_at
from megad2v.training.schedules import learning_rate

POINTS = 160
"""Updates that a curve is drawn through, besides its corners."""
PANEL, LEFT, TOP, WIDTH, HEIGHT = 300, 70, 46, 210, 110
"""Pixels: from one panel to the next; its axes' offset within it; the axes' size."""
COLOURS = ("#1f5fa8", "#a8481f", "#3d7a34")


@dataclass(frozen=True)
class Curve:
    """One quantity over the updates of a run."""

    title: str
    values: list[float]
    low: float
    high: float


def drawn_updates(config: Config) -> list[int]:
    """Evenly spaced updates, first and last, and both sides of the end of warm-up and of the decay's rise."""
    last = config.train.steps - 1
    corners = {config.schedule.warmup_steps, config.teacher.decay_steps or 0}
    near = {update + side for update in corners for side in (-1, 0)}
    return sorted({round(i * last / POINTS) for i in range(POINTS + 1)} | {u for u in near if 0 <= u <= last})


def curves(config: Config, updates: Sequence[int]) -> list[Curve]:
    """The three curves at `updates` (number of updates already taken)."""
    steps, peak, teacher = config.train.steps, config.optimizer.lr, config.teacher
    rise = steps if teacher.decay_steps is None else teacher.decay_steps
    rates = [learning_rate(u, peak=peak, steps=steps, schedule=config.schedule) for u in updates]
    decays = [decay_at(u + 1, start=teacher.decay_start, end=teacher.decay_end, steps=rise) for u in updates]
    weight_decay = config.optimizer.weight_decay
    return [
        Curve("learning rate", rates, 0.0, peak),
        Curve("decay of the teacher", decays, *sorted((teacher.decay_start, teacher.decay_end))),
        Curve("weight decay", [weight_decay] * len(updates), 0.0, weight_decay),
    ]


def figure(name: str, config: Config) -> str:
    """The SVG: three panels side by side under the recipe's name."""
    updates = drawn_updates(config)
    panels = [
        _panel(curve, updates, config.train.steps, x=PANEL * i, colour=COLOURS[i])
        for i, curve in enumerate(curves(config, updates))
    ]
    width, height = PANEL * len(panels), TOP + HEIGHT + 44
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="11" fill="#333">',
            f"<title>Schedules of {name}</title>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text x="{LEFT}" y="16" font-size="13" font-weight="bold">{name}</text>',
            *panels,
            "</svg>\n",
        ]
    )


def _panel(curve: Curve, updates: Sequence[int], steps: int, *, x: int, colour: str) -> str:
    left, bottom = x + LEFT, TOP + HEIGHT
    spread = curve.high - curve.low

    def at(update: int, value: float) -> str:
        height = (value - curve.low) / spread if spread else 0.5  # a constant runs through the middle
        return f"{left + WIDTH * update / steps:.1f},{bottom - HEIGHT * height:.1f}"

    ticks = [(curve.low, bottom), (curve.high, TOP)] if spread else [(curve.low, bottom - HEIGHT / 2)]
    labels = [
        f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{value:.6g}</text>' for value, y in ticks
    ]  # fmt: skip
    points = " ".join(at(update, value) for update, value in zip(updates, curve.values, strict=True))
    return "\n".join(
        [
            f'<text x="{left}" y="{TOP - 10}">{curve.title}</text>',
            f'<path d="M{left},{TOP} V{bottom} H{left + WIDTH}" fill="none" stroke="#999"/>',
            *labels,
            f'<text x="{left}" y="{bottom + 16}" text-anchor="middle">0</text>',
            f'<text x="{left + WIDTH}" y="{bottom + 16}" text-anchor="end">{steps:,}</text>',
            f'<text x="{left + WIDTH / 2:.0f}" y="{bottom + 34}" text-anchor="middle">updates</text>',
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>',
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line where the input is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", help="a recipe's name or a YAML file; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="folder for schedule_NAME.svg")
    options = parser.parse_args(arguments)
    try:
        configs = {Path(source).stem: load_config(source) for source in options.config or sorted(recipes())}
    except UserError as error:
        print(f"plot_schedules: error: {error}", file=sys.stderr)
        return error.exit_code
    options.output.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        path = options.output / f"schedule_{name}.svg"
        path.write_text(figure(name, config))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
