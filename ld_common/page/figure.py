"""Curves as inline SVG, which stretches to any width; the texts at its axes are HTML, so that they keep their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ld_common.page.content import Curve, Curves

COLORS = 8
"""Of the style sheet's classes `c0` to `c7`."""
MOST_CURVES = 8
"""More than these are drawn as their lowest and highest."""
MOST_TICKS = 5
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


def figure(content: Curves) -> str:
    """The HTML of a figure; its words for those who do not see it are in the label of the picture."""
    curves = [curve for curve in _few(content.curves) if curve.points]
    title = escape(content.title)
    if not curves:
        return f'<figure class="curves"><figcaption>{title}</figcaption><p>{escape(content.empty)}</p></figure>'
    rounds = sorted({number for curve in curves for number, _ in curve.points})
    heights = value_ticks([value for curve in curves for _, value in curve.points])
    span = max(1, rounds[-1] - rounds[0])
    low, high = heights[0], heights[-1]
    lines, legend, color = [], [], 0
    for curve in curves:
        style = "main" if curve.main else f"c{color % COLORS}"
        color += not curve.main
        places = [
            (
                100 * (number - rounds[0]) / span if len(rounds) > 1 else 50.0,
                100 * (high - value) / (high - low),
            )
            for number, value in curve.points
        ]
        lines.append(_line(places, style))
        legend.append(
            f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="{style}" d="M1 4H23"/></svg>'
            f"{escape(curve.name)}</li>"
        )
    grid = "".join(f'<path class="grid" d="M0 {_at(place, heights)}H100"/>' for place in range(len(heights)))
    values = "".join(f"<span>{text}</span>" for text in reversed(tick_texts(heights)))
    numbers = "".join(f"<span>{number}</span>" for number in round_ticks(rounds[0], rounds[-1]))
    words = escape(_words(content, curves))
    return (
        f'<figure class="curves"><figcaption>{title}</figcaption><ul class="legend">{"".join(legend)}</ul>'
        f'<div class="plot"><div class="heights" aria-hidden="true">{values}</div>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{words}">'
        f'{grid}{"".join(lines)}</svg><div class="rounds{" one" if len(rounds) == 1 else ""}" aria-hidden="true">'
        f'{numbers}</div><div class="axis" aria-hidden="true">round</div></div></figure>'
    )


def value_ticks(values: Sequence[float]) -> list[float]:
    """Round, evenly spaced numbers that enclose the values."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    rough = (high - low) / (MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in STEPS if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Evenly spaced numbers with the same number of decimals."""
    largest = max(map(abs, ticks))
    if largest >= 1e5 or largest < 1e-3:
        return [f"{value:.3g}" for value in ticks]
    step = ticks[1] - ticks[0]
    decimals = next(count for count in range(12) if abs(round(step, count) - step) < 1e-6 * step)
    return [f"{value + 0.0:.{decimals}f}" for value in ticks]


def round_ticks(first: int, last: int) -> list[int]:
    """Evenly spaced rounds from the first to the last."""
    span = last - first
    count = next((parts for parts in range(MOST_TICKS, 0, -1) if span and span % parts == 0), 1)
    return [first + span * part // count for part in range(count + 1)] if span else [first]


def _at(place: int, ticks: Sequence[float]) -> str:
    return f"{100 * (1 - place / (len(ticks) - 1)):.2f}"


def _line(places: Sequence[tuple[float, float]], style: str) -> str:
    """A curve, and a dot for each of its points: lines of no length, which stay round when the picture is stretched."""
    texts = [f"{x:.2f} {y:.2f}" for x, y in places]
    dots = "".join(f"M{text}h0" for text in texts)
    return f'<path class="{style}" d="M{"L".join(texts)}"/><path class="dot {style}" d="{dots}"/>'


def _few(curves: Sequence[Curve]) -> list[Curve]:
    """The curves; of many, the main ones and the lowest and highest of the others in each round."""
    main, others = [curve for curve in curves if curve.main], [curve for curve in curves if not curve.main]
    if len(others) <= MOST_CURVES:
        return [*main, *others]
    values: dict[int, list[float]] = {}
    for curve in others:
        for number, value in curve.points:
            values.setdefault(number, []).append(value)
    rounds = sorted(values)
    return [
        *main,
        Curve(f"lowest of {len(others)}", [(number, min(values[number])) for number in rounds]),
        Curve(f"highest of {len(others)}", [(number, max(values[number])) for number in rounds]),
    ]


def _words(content: Curves, curves: Sequence[Curve]) -> str:
    """The figure in words."""
    said = [
        f"{curve.name}: {curve.points[0][1]:.4g} in round {curve.points[0][0]}, {curve.points[-1][1]:.4g} in round "
        f"{curve.points[-1][0]}"
        for curve in curves
    ]
    return f"{content.title}. {'; '.join(said)}."
