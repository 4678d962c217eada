"""The run folder: configuration, metrics, events and checkpoints, at a path or an fsspec URL."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import IO, Any

import ray
from fsspec.implementations.local import LocalFileSystem

from datasets import DataError
from datasets.storage import matching, passing, persistent, remove, said, storage, write_whole
from workers.config import Config, UserError
from workers.errors import RunFailed
from workers.output import check_folder, claimed, writing

COMPLETE = ".metadata"  # `torch.distributed.checkpoint` writes it last
STEP = f"step-{8 * '[0-9]'}"  # a checkpoint's folder
CONFIG, METRICS, EVENTS = "config.toml", "metrics.jsonl", "events.jsonl"
NEEDED: dict[str, dict[str, Any]] = {  # in each line
    METRICS: {"time": (int, float), "split": str, "step": int}
    | dict.fromkeys(("loss", "top1_error", "top5_error"), (int, float)),
    EVENTS: {"time": (int, float), "event": str},
}
SCALE = "augmenters"  # the size of the fleet that was asked for


class RunFolder:
    """A run's folder; nothing is written before `create`.

    Files are written locally, and for a URL copied there by `publish`. Raises UserError if the
    folder holds a run and `resume` is not said, or the other way round; `resume` None goes on with
    a run if there is one.
    """

    def __init__(self, config: Config, *, resume: bool | None) -> None:
        self.config, self.url = config, config.run
        self.fs, self.path = storage(self.url)
        self.remote = "://" in self.url
        self.new = not self.fs.exists(f"{self.path}/{CONFIG}")
        if self.new and not self.remote:
            check_folder(self.path)
        if not self.new and resume is False:
            raise self._taken()
        if self.new and resume:
            raise UserError(f"{config.run} holds no run to resume: {CONFIG} is not there")
        self.local = "" if self.remote else self.path  # where files are written
        self._board: Any = None
        self._claim: IO[bytes] | None = None

    def create(self) -> None:
        """Makes the folder what it has to be for the run to start or go on.

        Raises UserError if it cannot be written, or another process trains there.
        """
        try:
            self.fs.makedirs(self.path, exist_ok=True)
            if self.remote:
                self.local = tempfile.mkdtemp(prefix="towers-run-")
                for lines in matching(self.fs, self.path, "*.jsonl"):  # none before a publishing
                    self.fs.get_file(lines, f"{self.local}/{lines.rpartition('/')[2]}")
            if not self._claim:
                self._claim_it()
            for name in (METRICS, EVENTS):
                _end_line(f"{self.local}/{name}")
            self._configure()
        except BaseException as error:
            self._clear()
            if isinstance(error, OSError) and not passing(error):
                raise UserError(f"{self.url} cannot be written: {error}") from None
            raise
        from tensorboard.summary import Writer

        self._board = Writer(f"{self.local}/tensorboard")

    def _claim_it(self) -> None:
        """Keeps other processes from training in this folder, for as long as this one lives: on
        stores, which have no locks, only those that begin there too.
        """
        try:
            self._claim = claimed(f"{self.local}/{EVENTS}")
        except BlockingIOError:
            raise UserError(f"{self.url}: another process trains there") from None
        self.fs.invalidate_cache()
        if self.new and self.fs.exists(f"{self.path}/{CONFIG}"):
            raise self._taken()

    def _taken(self) -> UserError:
        return UserError(f"{self.url} already holds a run: --resume it, or name another")

    def _configure(self) -> None:
        """Writes the configuration, at a URL there too: it is what makes a folder a run."""
        text = self.config.to_toml().encode()
        write_whole(LocalFileSystem(), f"{self.local}/{CONFIG}", text)
        if self.remote:
            write_whole(self.fs, f"{self.path}/{CONFIG}", text)

    def scaled(self, augmenters: str) -> None:
        """Notes a fleet's other size, MIN:MAX, so that whoever resumes the run has it too."""
        self.config = replace(self.config, augmenters=augmenters)
        self.event("scale", augmenters=augmenters)
        self._configure()

    def metrics(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and its numbers for TensorBoard."""
        self._append(METRICS, line)
        tag = line["split"]
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "step":
                self._board.add_scalar(f"{tag}/{name}", value, line["step"])

    def event(self, kind: str, **values: Any) -> None:
        """A line of events.jsonl: a start, a restart, a warning, the end."""
        self._append(EVENTS, {"event": kind, **values})

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Those of a kind that there were."""
        lines = read_lines(self.local or self.url, EVENTS)
        return [line for line in lines if line["event"] == kind]

    def _append(self, name: str, line: dict[str, Any]) -> None:
        try:
            with open(f"{self.local}/{name}", "a") as f:
                f.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")
        except OSError as error:
            why = error.strerror or error
            raise RunFailed(f"{self.local}/{name} cannot be written: {why}") from None

    def wanted_augmenters(self) -> str:
        """What `towers scale` asked for last, as MIN:MAX; "" if it did not, if that is something
        else, or nobody can tell now: it is asked again.
        """
        try:
            wanted = read_scale(self.url)
            if wanted and wanted != self.config.augmenters:
                _ = replace(self.config, augmenters=wanted)
            return wanted
        except Exception:  # whatever it is, the run has no need of it
            return ""

    def forget_scale(self, augmenters: str) -> None:
        """Drops what `towers scale` asked for, if that is still this: whoever resumes the run says
        otherwise.
        """
        if augmenters and self.wanted_augmenters() == augmenters:
            with writing(self.url), suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.path}/{SCALE}")

    def publish(self) -> None:
        """Copies what was written so far to the run's URL, if it has one."""
        if self.remote:
            self.fs.put(self.local.rstrip("/") + "/", self.path, recursive=True)

    def close(self) -> str:
        """Ends what `create` began, if it did. Returns what there is to say of lines that a store
        did not take, "" if it did: they are left on this machine.
        """
        if self._board:
            try:
                self._board.close()
                persistent(self.url, self.publish)
            except Exception as error:
                self.remote = False  # what is here stays
                self._clear()
                return f"{self.url}: {said(error)}; the run's last lines are in {self.local}"
        self._clear()
        return ""

    @contextmanager
    def held(self, say: Callable[[str], object]) -> Iterator[None]:
        """Claims a run that is there, on a disk, and closes the folder at the block's end; has said
        what there is to say of that. Raises UserError if another process trains there.
        """
        if not (self.new or self.remote):
            with writing(self.url):
                self._claim_it()
        try:
            yield
        finally:
            if left := self.close():
                say(left)

    def _clear(self) -> None:
        """Lets go of the folder, and removes this machine's copy of a run at a URL."""
        if self._claim:
            self._claim.close()
            self._claim = None
        if self.remote and self.local:
            shutil.rmtree(self.local, ignore_errors=True)

    def checkpoint(self, step: int) -> str:
        """The folder or URL of the checkpoint of a step."""
        return checkpoint_url(self.url, step)

    def checkpoints(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        return checkpoints(self.url)

    def prune(self, keep: int, errors: dict[int, float]) -> None:
        """Removes all but the newest `keep` checkpoints and the one with the least of the `errors`,
        by steps, and what is left of one whose removal broke off.
        """
        steps = self.checkpoints()
        kept = steps[-keep:]
        best = min((step for step in steps if step in errors), key=errors.__getitem__, default=None)
        for place in matching(self.fs, f"{self.path}/checkpoints", STEP):
            step = _step(place)
            if step not in (*kept, best) and step < kept[-1]:
                with suppress(FileNotFoundError):  # first: what is left may be half of it
                    self.fs.rm_file(f"{place}/{COMPLETE}")
                remove(self.fs, place)


def occupied(run: str) -> bool:
    """Whether a process trains in this folder on a disk."""
    fs, path = storage(run)
    if "://" in run or not fs.exists(f"{path}/{EVENTS}"):
        return False
    try:
        claimed(f"{path}/{EVENTS}").close()
    except BlockingIOError:
        return True
    return False


def _end_line(path: str) -> None:
    """Removes the half line that a machine's end may have left last in a file."""
    if os.path.exists(path):
        with open(path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def is_run(url: str) -> bool:
    """Whether a run has begun in this folder or URL."""
    fs, path = storage(url)
    return fs.exists(f"{path}/{CONFIG}")


def read_lines(run: str, name: str) -> list[dict[str, Any]]:
    """The lines of one of a run's .jsonl files, [] if it is not there.

    Raises DataError, naming the line, if one is damaged.
    """
    fs, path = storage(run)
    if not fs.exists(f"{path}/{name}"):
        return []
    needed = NEEDED.get(name, {})
    whole = fs.cat_file(f"{path}/{name}").rpartition(b"\n")[0]  # a run may be writing
    found = []
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = dict(json.loads(text))
            for key, kinds in needed.items():
                if not isinstance(line.get(key), kinds):
                    raise TypeError
        except (ValueError, TypeError):
            raise DataError(
                f"{run}/{name} line {number}: no JSON with {', '.join(needed)}; remove the line"
            ) from None
        found.append(line)
    return found


def checkpoint_url(run: str, step: int) -> str:
    """The folder or URL of a run's checkpoint of a step."""
    return f"{run}/checkpoints/step-{step:08d}"


def write_scale(run: str, augmenters: str) -> bool:
    """Asks a run for a fleet of another size, which it has from then on; whether it goes on, as far
    as can be told.

    Raises UserError if there is none to be asked.
    """
    if not is_run(run):
        raise UserError(f"{run}: no run there")
    fs, path = storage(run)
    if "://" in run:
        goes_on = [event["event"] for event in read_lines(run, EVENTS)][-1:] != ["end"]
    else:
        goes_on = occupied(run)
    with writing(run):
        write_whole(fs, f"{path}/{SCALE}", augmenters.encode())
    return goes_on


def read_scale(run: str) -> str:
    """What `write_scale` wrote last, "" if nothing."""
    fs, path = storage(run)
    fs.invalidate_cache()
    try:
        return fs.cat_file(f"{path}/{SCALE}").decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def check_visible(run: str) -> None:
    """Raises DataError if this node does not see the run's folder that the driver made."""
    if not is_run(run):
        raise DataError(
            f"{run} is not there on {ray.util.get_node_ip_address()}: on a cluster a run needs "
            "a folder that all nodes share, or a URL such as s3://bucket/run"
        )


def checkpoints(run: str) -> list[int]:
    """The steps of a run's complete checkpoints, in order."""
    fs, path = storage(run)
    fs.invalidate_cache()
    found = matching(fs, f"{path}/checkpoints", STEP)
    return sorted(_step(folder) for folder in found if fs.exists(f"{folder}/{COMPLETE}"))


def _step(folder: str) -> int:
    return int(folder.rpartition("step-")[2])
