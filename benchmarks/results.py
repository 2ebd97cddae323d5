"""Read result files: benchmarks/results/<gpu>-<date>-<suite>.json, as `make gpu` writes them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Suite", "read_results"]

ROW_KEYS = frozenset(
    "bytes_moved ceilings commit device dtype failed floor_us flop intensities modes".split()
)
VARIANT_KEYS = frozenset("gb_per_s median_us p20_us p80_us percent_of_ceiling tflop_per_s".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One file. gpu: as in its name. rows: extra_info by benchmark name."""

    gpu: str
    date: str
    name: str
    rows: Mapping[str, Mapping[str, Any]]

    @property
    def where(self) -> str:
        row = next(iter(self.rows.values()))
        return f"{row['device']}, {self.date}, commit {row['commit']}"


def _rows_of(path: Path) -> dict[str, Mapping[str, Any]]:
    try:
        data = json.loads(path.read_text("utf-8"))
        rows = {row["name"]: row["extra_info"] for row in data["benchmarks"]}
        for name, row in rows.items():
            missing = ROW_KEYS - row.keys()
            for mode in row.get("modes", {}).values():
                missing |= {"ours"} - mode.keys()
                for variant in mode.values():
                    missing |= VARIANT_KEYS - variant.keys()
            if missing:
                raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = repr(error) if type(error) is KeyError else str(error)
        raise ValueError(f"{path.name} is no benchmark result: {reason}; remove it") from None
    return rows


def read_results(folder: Path) -> list[Suite]:
    """The newest file of each GPU and suite that has rows, in the order of their names.

    Raises:
        ValueError: a file is not a result of these benchmarks, or is called otherwise.
    """
    newest: dict[tuple[str, str], Suite] = {}
    for path in sorted(folder.glob("*.json")):
        found = re.fullmatch(r"(.+)-(\d{4}-\d\d-\d\d)-(\w+)\.json", path.name)
        if found is None:
            raise ValueError(
                f"{path.name} is no benchmark result: they are called <gpu>-<date>-<suite>.json"
            )
        gpu, date, name = found.groups()
        # sorted by GPU, then by date: the last one stays
        if rows := _rows_of(path):
            newest[gpu, name] = Suite(gpu=gpu, date=date, name=name, rows=rows)
    return [newest[key] for key in sorted(newest)]
