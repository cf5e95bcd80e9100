"""Counted figures as they were when they were last looked at: `scripts/baselines/NAME.json` holds them with a tolerance.

A file is {"how": what counts them, "tolerance": relative, "figures": {name: number}}. A figure that has changed for a good
reason is written there anew, in the commit that changes it.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "baselines"


def differences(name: str, counted: dict[str, float], folder: Path = FOLDER) -> list[str]:
    """Where counted figures are not those of NAME.json within its tolerance, one line each; a name that only one of them
    has is a difference, too."""
    baseline = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    before, tolerance = baseline["figures"], baseline["tolerance"]
    missing = [f"{figure}: not in {name}.json" for figure in counted.keys() - before.keys()]
    missing += [f"{figure}: not counted" for figure in before.keys() - counted.keys()]
    return sorted(missing) + [
        f"{figure}: {counted[figure]:.4g}, was {before[figure]:.4g} (tolerance {tolerance:.1%})"
        for figure in before
        if figure in counted and abs(counted[figure] - before[figure]) > tolerance * abs(before[figure])
    ]
