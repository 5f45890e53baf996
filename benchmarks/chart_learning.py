"""The curves of results/learning.json as one picture.

python benchmarks/chart_learning.py      writes docs/learning.svg
"""

from html import escape
from pathlib import Path
from typing import Any

from runtime.files import read_json
from tools.charts import nice_ticks

HERE = Path(__file__).parent
PANEL, HEIGHT = 450, 300  # pixels
LEFT, RIGHT, TOP, BOTTOM = 36, 156, 28, 34  # margins of a panel; names stand at the right
COLORS = {"ours": "#1a7f37", "LightlyTrain, our settings": "#8250df", "LightlyTrain, its settings": "#bc4c00"}
NAMES = {"ours": "ours", "lightly/ours": "LightlyTrain, our settings", "lightly/defaults": "LightlyTrain, its settings"}


def main() -> None:
    result = read_json(HERE / "results" / "learning.json")
    sets = list(result["runs"][0]["curve"][0]["knn"])
    panels = [panel(result, name, left=number * PANEL) for number, name in enumerate(sets)]
    size = f'width="{PANEL * len(sets)}" height="{HEIGHT}"'
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
        f'<rect {size} fill="white"/>{"".join(panels)}</svg>\n'
    )
    (HERE.parent / "docs" / "learning.svg").write_text(text)


def panel(result: dict[str, Any], data: str, *, left: int) -> str:
    """10-NN accuracy over minutes on one evaluation set: a line for each training, a dashed one for each baseline."""
    flat = {name: found[data]["k10"][0] for name, found in result["baselines"].items() if "seed" not in name}
    twins = [found[data]["k10"][0] for name, found in result["baselines"].items() if "seed" in name]
    flat["random weights"] = sum(twins) / len(twins)
    lines = [
        (
            program(run),
            [(0.0, flat["random weights"]), *((p["minutes"], p["knn"][data]["k10"][0]) for p in run["curve"])],
        )
        for run in result["runs"]
    ]
    values = [*flat.values(), *(y for _, points in lines for _, y in points)]
    ticks = nice_ticks(min(values), max(values))
    end = max(x for _, points in lines for x, _ in points)
    low, high = ticks[0], ticks[-1]

    def x(minutes: float) -> float:
        return round(left + LEFT + (PANEL - LEFT - RIGHT) * minutes / end, 1)

    def y(percent: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (percent - low) / (high - low), 1)

    parts = [f'<text x="{x(0)}" y="16" font-weight="bold">{escape(data)}, 10-NN accuracy (%)</text>']
    parts += [
        f'<line x1="{x(0)}" x2="{x(end)}" y1="{y(t)}" y2="{y(t)}" stroke="#ddd"/>'
        f'<text x="{x(0) - 6}" y="{y(t) + 4}" text-anchor="end">{t:g}</text>'
        for t in ticks
    ]
    parts.append(f'<text x="{x(end)}" y="{HEIGHT - 10}" text-anchor="end">{end:.0f} minutes of one core</text>')
    labels = [(y(value), name, "#777") for name, value in flat.items()]
    for value in flat.values():
        parts.append(
            f'<line x1="{x(0)}" x2="{x(end)}" y1="{y(value)}" y2="{y(value)}" stroke="#777" stroke-dasharray="3 4"/>'
        )
    for name, points in lines:
        path = " ".join(f"{x(minutes)},{y(percent)}" for minutes, percent in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[name]}" stroke-width="2"/>')
        if name not in [label for _, label, _ in labels]:
            labels.append((y(points[-1][1]), name, COLORS[name]))
    place = 0.0
    for wanted, name, color in sorted(labels):
        place = max(wanted + 4, place + 12)  # below the one above
        parts.append(f'<text x="{x(end) + 6}" y="{place:.1f}" fill="{color}">{escape(name)}</text>')
    return "".join(parts)


def program(run: dict[str, Any]) -> str:
    return NAMES["ours" if run["program"] == "ours" else f"lightly/{run['settings']}"]


if __name__ == "__main__":
    main()
