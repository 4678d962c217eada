"""Where the seconds go from the command `towers train` to its first trained step.

    python benchmarks/startup.py [--json FILE]

Runs `towers train` on a small drawn data set for two steps, in a process that notes the time when
each part is done, and prints the seconds of each part, and those of `towers --help`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from table import publish

PARTS = {
    "import": "Python, Ray and Towers are imported",
    "ray": "Ray runs",
    "data": "the data is known",
    "room": "the towers have a place",
    "join": "the towers have met, with their weights",
    "step": "first step",
    "end": "second step, checkpoint, end",
}


def child(shards: str, run: str) -> None:
    """Trains as `towers train` does, and prints the time when each part was done."""
    os.environ["RAY_ADDRESS"] = "local"
    done: dict[str, float] = {}

    def note(module: Any, name: str, part: str) -> None:
        """Notes the time when a function of a module first returns."""
        function = getattr(module, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            done.setdefault(part, time.time())
            return result

        setattr(module, name, noting)

    import ray

    from workers import room, supervisor
    from workers.config import configure

    done["import"] = time.time()
    note(ray, "init", "ray")
    note(supervisor, "_job", "data")
    note(room, "reserve", "room")
    small = {"network": "alexnet-mini", "steps": 2, "log_every": 1}
    supervisor.train(configure({"shards": shards, "run": run, **small}))
    done["end"] = time.time()
    for name, event, part in (("events", "start", "join"), ("metrics", "train", "step")):
        lines = map(json.loads, Path(run, f"{name}.jsonl").read_text().splitlines())
        done[part] = next(x["time"] for x in lines if event in (x.get("event"), x.get("split")))
    print(json.dumps(done))


def seconds(shards: str) -> dict[str, float]:
    """Of each part, once."""
    with tempfile.TemporaryDirectory(prefix="towers-") as folder:
        start = time.time()
        command = [sys.executable, __file__, "--child", shards, f"{folder}/run"]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        done = json.loads(printed.splitlines()[-1])
    found = {}
    for part in PARTS:
        found[part], start = done[part] - start, done[part]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the figures here, and FILE.md")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    from datasets.drawn import write_drawn

    with tempfile.TemporaryDirectory(prefix="towers-") as shards:
        write_drawn(shards, train=1000, val=100)
        turns = [seconds(shards) for _ in range(args.turns)]
    helped = []
    for _ in range(args.turns):
        start = time.time()
        subprocess.run([sys.executable, "-m", "workers.cli", "--help"], capture_output=True)
        helped.append(time.time() - start)
    median = {part: statistics.median(turn[part] for turn in turns) for part in PARTS}
    first = list(PARTS)[: list(PARTS).index("step") + 1]
    rows: list[dict[str, Any]] = [
        {"until": PARTS[part], "seconds": median[part]} for part in PARTS if part in first
    ]
    rows.append(
        {"until": "from the command to the first step", "seconds": sum(median[p] for p in first)}
    )
    rows.append({"until": PARTS["end"], "seconds": median["end"]})
    rows.append({"until": "`towers --help`", "seconds": statistics.median(helped)})
    publish("Start-up, median of turns", rows, args.json)


if __name__ == "__main__":
    main()
