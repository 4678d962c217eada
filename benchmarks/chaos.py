"""Kills processes of a run at random moments and compares its weights with an undisturbed one's.

    python benchmarks/chaos.py --kills 20
    python benchmarks/chaos.py --kills 10 --kinds tower

Each kill is a SIGKILL from a seed: which kind of process, and when after a checkpoint began (at
once, which is while it is written, or up to a second later). Prints for each kind how long training
stood still after it, median and most, and how many steps were trained again. Exit code 1 if the
weights differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets.drawn import write_drawn

KINDS = {
    "tower": "ray::TowerActor",
    "feed": "ray::Feed",
    "augmenter": "ray::MapWorker",
    "supervisor": "",
    "node": "/raylet",
    "control": "/gcs_server",
}
"""Kinds of processes and what tells them: how their command lines start, or their programs end."""

STEPS_A_KILL = 80  # that the run has, so that it is not over before it was killed often enough


def start(shards: Path, run: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """`towers train` with a Ray of its own, printing into RUN.out and RUN.err."""
    towers = Path(sys.executable).parent / "towers"
    command = [str(towers), "train", str(shards), "--run", str(run), *options]
    # Not a pipe: a full one would stop the run while nobody reads.
    with open(f"{run}.out", "w") as out, open(f"{run}.err", "w") as err:
        return subprocess.Popen(
            command, env={**os.environ, "RAY_ADDRESS": "local"}, stdout=out, stderr=err
        )


def finish(process: subprocess.Popen[bytes], run: Path) -> dict[str, Any]:
    """The result that a run prints."""
    process.wait()
    out, err = (Path(f"{run}{end}").read_text() for end in (".out", ".err"))
    if process.returncode:
        sys.exit(f"{out}{err}the run failed with exit code {process.returncode}")
    return json.loads(out.splitlines()[-1])


def below(pid: int) -> dict[int, tuple[int, str]]:
    """Parents and command lines of all processes below one."""
    known: dict[int, tuple[int, str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            known[int(folder.name)] = parent, folder.joinpath("cmdline").read_bytes().decode()
        except OSError:  # it ended meanwhile
            continue
    found: dict[int, tuple[int, str]] = {}
    new = {pid}
    while new:
        new = {child for child, (parent, _) in known.items() if parent in new}
        found |= {child: known[child] for child in new}
    return found


def kill(run: subprocess.Popen[bytes], kind: str) -> float | None:
    """Kills a process of a kind that belongs to a run, once there is one; the time, None if the
    run ended before."""
    mark = KINDS[kind]
    while run.poll() is None:
        for pid, (parent, line) in sorted(below(run.pid).items()):
            program = line.split("\0")[0]
            if (
                (not mark and parent == run.pid)
                or (mark.startswith("/") and program.endswith(mark))
                or (mark.startswith("ray::") and program.startswith(mark))
            ):
                os.kill(pid, signal.SIGKILL)
                return time.time()
        time.sleep(0.05)
    return None


def newest(run: Path) -> int:
    """The step of the newest checkpoint that was begun."""
    return max((int(p.name[5:]) for p in run.glob("checkpoints/step-*")), default=0)


def steps(run: Path) -> list[tuple[float, int]]:
    """When each step was done, in the order of time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["time"], line["step"]) for line in lines if line["split"] == "train"]


def disturb(run: Path, process: subprocess.Popen[bytes], kills: int, kinds: list[str], seed: int):  # type: ignore[no-untyped-def]
    """Kills so often, and yields kind and time of each."""
    chance = random.Random(seed)
    for number in range(kills):
        kind = kinds[number] if number < len(kinds) else chance.choice(kinds)
        before = newest(run)
        while newest(run) <= before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.choice([0.0, chance.uniform(0, 1)]))
        at = kill(process, kind)
        if at is None:
            finish(process, run)
            sys.exit(f"the run ended before it was killed {kills} times: {number}")
        print(f"killed {kind} after checkpoint {newest(run)}", file=sys.stderr, flush=True)
        yield kind, at
        while process.poll() is None and not _went_on(run, at):
            time.sleep(0.05)


def _went_on(run: Path, at: float) -> bool:
    """Whether steps were trained well after a moment: what was on its way then is done before."""
    return any(when > at + 2 for when, _ in steps(run)[-3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kinds", default=",".join(KINDS), help="Separated by commas.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="Print one JSON object at the end.")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    images, batch = 150, 32
    epochs = -(-args.kills * STEPS_A_KILL * batch // images)
    options = f"--network alexnet-mini --batch {batch} --epochs {epochs} --checkpoint-every 4"
    options += " --log-every 1 --augmenters 2:2 --json"
    with tempfile.TemporaryDirectory(prefix="towers-") as name:
        folder = Path(name)
        write_drawn(str(folder / "shards"), train=images, val=50)
        undisturbed = folder / "undisturbed"
        whole = finish(start(folder / "shards", undisturbed, options.split()), undisturbed)
        process = start(folder / "shards", folder / "run", options.split())
        try:
            killed = list(disturb(folder / "run", process, args.kills, kinds, args.seed))
            result = finish(process, folder / "run")
        finally:
            process.terminate()
        done = steps(folder / "run")
    rows = []
    for number, (kind, at) in enumerate(killed):
        end = killed[number + 1][1] if number + 1 < len(killed) else float("inf")
        after = [(when, step) for when, step in done if at - 1 < when < end]
        # The longest time without a step since the kill: steps on their way were still done.
        gaps = [
            (b[0] - max(a[0], at), max(0, a[1] + 1 - b[1]))
            for a, b in itertools.pairwise(after)
            if b[0] > at
        ]
        rows.append((kind, *max(gaps)))
    same = result["weights_sha256"] == whole["weights_sha256"]
    print(f"{'killed':<12}{'times':>6}{'seconds without a step':>26}{'steps again':>13}")
    for kind in sorted({kind for kind, _, _ in rows}):
        seconds = [s for k, s, _ in rows if k == kind]
        again = [r for k, _, r in rows if k == kind]
        median, most = statistics.median(seconds), max(seconds)
        print(f"{kind:<12}{len(seconds):>6}{median:>15.1f} (max {most:.1f}){max(again):>13}")
    print(f"restarts {result['restarts']}; weights {'equal, bit for bit' if same else 'DIFFER'}")
    if args.json:
        found = [{"kind": k, "seconds": s, "steps_again": r} for k, s, r in rows]
        print(json.dumps({"kills": found, "equal": same, "restarts": result["restarts"]}))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
