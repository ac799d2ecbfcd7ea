"""Draws docs/performance.svg from the benchmarks' JSON files: seconds of a step by part, Perdure beside TRL.

python benchmarks/plot.py bench-workspace/vs_trl.json docs/performance.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLOURS = {"rollout": "#4c78a8", "teacher": "#f58518", "forward": "#54a24b", "backward": "#88d27a", "loss": "#b279a2",
           "optimizer": "#9d9d9d", "all but rollout": "#d8c9a8"}  # fmt: skip
NAMES = {"": "Perdure", "trl.equal_numerics": "TRL, fp32 masters", "trl.fastest": "TRL, all bf16"}
LEFT, WIDTH, BAR, GAP = 180, 460, 18, 6


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    bars = []
    for state in dict.fromkeys(key.rsplit(".", 1)[1] for key in report["seconds"]):
        for kind, name in NAMES.items():
            key = f"{kind or 'perdure'}.{state}"
            bars.append((f"{name}, {state}", parts(report, key), report["seconds"][key]["median"]))
    Path(sys.argv[2]).write_text(svg(bars), encoding="utf-8")


def parts(report: dict, key: str) -> dict[str, float]:
    """Parts of the median step. TRL's own split is coarser."""
    found, whole = report["parts"][key], report["seconds"][key]["median"]
    if "teacher" not in found:
        return {"rollout": found["rollout"], "all but rollout": whole - found["rollout"]}
    return {part: found[part] for part in COLOURS if part in found}


def svg(bars: list[tuple[str, dict[str, float], float]]) -> str:
    most = max(whole for _, _, whole in bars)
    rows, y = [], 10
    for place, (name, found, whole) in enumerate(bars):
        y += GAP * 2 if place and place % len(NAMES) == 0 else 0
        rows.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{name}</text>')
        x = float(LEFT)
        for part, seconds in found.items():
            wide = seconds / most * WIDTH
            title = f"<title>{part} {seconds:.2f} s</title>"
            rows.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{BAR}" fill="{COLOURS[part]}">{title}</rect>'
            )
            x += wide
        rows.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{whole:.1f} s</text>')
        y += BAR + GAP
    x, y = LEFT, y + 12
    for part, colour in COLOURS.items():
        rows.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/>')
        rows.append(f'<text x="{x + 14}" y="{y + 10}">{part}</text>')
        x += 24 + 7 * len(part)
    style = 'font-family="system-ui, sans-serif" font-size="12"'
    size = f'width="{LEFT + WIDTH + 130}" height="{y + 24}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *rows, "</svg>", ""])


if __name__ == "__main__":
    main()
