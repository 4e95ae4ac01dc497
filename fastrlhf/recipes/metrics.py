"""Write and read `metrics.json`, the file with all figures of a run."""

import json
import math
from pathlib import Path
from typing import Any


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write the figures. NaN and infinity, as in a run that diverged, are written as null."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(metrics), indent=2, default=str, ensure_ascii=False, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """Read the figures, or return None if there is no `metrics.json` in the folder."""
    file = folder / "metrics.json"
    if not file.exists():
        return None
    metrics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return metrics


def number(value: float | None) -> float:
    """Turn a figure read from `metrics.json` into a float; null becomes NaN."""
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
