"""What benchmarks print and write: figures as a table, with the machine that they are of."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "ray", "numpy", "pyarrow", "pillow")


def publish(name: str, rows: Sequence[dict[str, Any]], json_path: str | None = None) -> None:
    """Prints `rows` as a table called `name`. With `json_path`, writes name, machine and rows there
    as JSON, and the table with the machine beside it as Markdown, with the ending .md.

    The rows' keys are the columns, in the order in which they first come; a row may lack some, and
    None is shown as nothing.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = [[_show(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *shown, strict=True)]
    numeric = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]

    def line(cells: Sequence[str], gap: str) -> str:
        aligned = zip(cells, widths, numeric, strict=True)
        return gap.join(c.rjust(w) if right else c.ljust(w) for c, w, right in aligned)

    print(name)
    for cells in (columns, *shown):
        print(f"  {line(cells, '  ').rstrip()}")
    if json_path:
        found = machine()
        text = json.dumps({"name": name, "machine": found, "rows": list(rows)}, indent=1)
        Path(json_path).write_text(text + "\n")
        aligned = zip(widths, numeric, strict=True)
        rule = ["-" * (width - right) + ":" * right for width, right in aligned]
        table = [f"| {line(cells, ' | ')} |" for cells in (columns, rule, *shown)]
        where = "; ".join(f"{key} {value}" for key, value in found.items())
        markdown = "\n".join([f"### {name}", "", *table, "", where, ""])
        Path(json_path).with_suffix(".md").write_text(markdown)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What figures depend on: processor, cores that this process may use, memory, GPU if torch is
    loaded and has one, versions, and the date.
    """
    found: dict[str, Any] = {
        "processor": _line("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": cores(),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "date": time.strftime("%Y-%m-%d")}


def _line(path: str, key: str) -> str:
    """The value of the first line `key: value` in a file, "" if there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:#.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
