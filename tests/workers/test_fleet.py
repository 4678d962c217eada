"""A batch is the same whatever the fleet; no row is lost, and none comes twice."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from datasets.augmentation import Batch
from datasets.plan import Itinerary
from datasets.shards import open_dataset
from datasets.statistics import Statistics
from pipeline.mesh import Mesh
from tests.workers.waiting import until
from workers.config import configure
from workers.feed import CALM_SECONDS, Feed
from workers.fleet import Fleet, part_bytes, store_bytes
from workers.measure import measure
from workers.parts import Packed, Part, pack, unpack
from workers.placement import Placement, decide
from workers.watch import Watch

NAMES = ("crops", "labels", "shifts", "rows")


def fleet(shards: str, where: Placement | None = None, **given: object) -> Fleet:
    given = {"network": "alexnet-mini", "epochs": 2, "batch": 16, "augmenters": "1:1", **given}
    config = configure({"shards": shards, "run": "r", **given})
    dataset = open_dataset(shards)
    itinerary = Itinerary(
        dataset.groups("train"),
        ("val", dataset.groups("val")),
        batch=config.batch,
        seed=config.seed,
        epochs=config.epochs,
    )
    statistics = Statistics.load(f"{shards}/statistics.npz")
    return Fleet(dataset, itinerary, config, where or decide([{"CPU": 4}], config), statistics)


def digest(part: Part) -> str:
    arrays = b"".join(getattr(part.batch, name).tobytes() for name in NAMES)
    return hashlib.sha256(arrays + part.places.tobytes()).hexdigest()


def stream(made: Fleet, start: int = 0) -> Iterator[tuple[int, int, Part]]:
    for index, replica, ref in made.stream(start, Watch()):
        yield index, replica, unpack(*ray.get([ref.pixels, ref.rest]))


def digests(made: Fleet, start: int = 0) -> dict[tuple[int, int], str]:
    return {(index, replica): digest(part) for index, replica, part in stream(made, start)}


def loaded(made: Fleet) -> Iterator[Part]:
    """The parts of each item in order, made in this process without Ray, of one replica."""
    loaders: dict = {}
    for index in range(len(made.itinerary)):
        yield made.load(index, 0, loaders)


def digests_without_ray(made: Fleet) -> dict[tuple[int, int], str]:
    return {(index, 0): digest(part) for index, part in enumerate(loaded(made))}


@pytest.fixture(scope="module")
def alone(shards: str) -> dict[tuple[int, int], str]:
    """What the plan says, made in this process without Ray, each image decoded each time."""
    return digests_without_ray(fleet(shards, cache=0.0))


def test_fleets_of_any_size_make_the_same_batches(
    shards: str, alone: dict[tuple[int, int], str], cluster: None
) -> None:
    """Four augmenters here, one and two below."""
    assert digests(fleet(shards, augmenters="4:4")) == alone


def test_a_stream_of_many_executions_is_one_stream(
    shards: str,
    alone: dict[tuple[int, int], str],
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.fleet.SEGMENT", 20)
    assert digests(fleet(shards)) == alone


def test_every_row_comes_once_an_epoch_and_once_an_evaluation(shards: str) -> None:
    """In the batches that every fleet makes."""
    made = fleet(shards)
    seen: dict[tuple[str, int], list[int]] = {}
    for index, part in enumerate(loaded(made)):
        item = made.itinerary.item(index)
        seen.setdefault((item.split, item.epoch), []).extend(part.batch.rows.tolist())
    for (split, _), rows in seen.items():
        assert sorted(rows) == list(range(made.dataset.rows(split)))
    assert set(seen) == {("train", 0), ("val", 0), ("train", 1), ("val", 1)}


def test_replicas_get_the_parts_of_the_same_batch(shards: str, cluster: None) -> None:
    whole = [part.batch for part in loaded(fleet(shards, epochs=1))]
    nodes = [{"CPU": 8.0}]
    config = configure({"run": "r", "replicas": 2, "batch": 16})
    parts = list(stream(fleet(shards, decide(nodes, config), epochs=1, replicas=2)))
    assert len(parts) == 2 * len(whole)
    for first, second in zip(parts[::2], parts[1::2], strict=True):
        both = [first[2].batch, second[2].batch]
        assert (first[:2], second[:2]) == ((first[0], 0), (first[0], 1))
        places = np.concatenate([first[2].places, second[2].places])
        assert places.tolist() == list(range(len(places)))
        for name in NAMES:
            joined = np.concatenate([getattr(part, name) for part in both])
            assert joined.tobytes() == getattr(whole[first[0]], name).tobytes()


def test_a_killed_augmenter_changes_nothing(
    shards: str, cluster: None, processes: Callable[[str], list[int]]
) -> None:
    """Killed with blocks in hand, and far more to come than can be made ahead."""
    made = fleet(shards, augmenters="2:2", epochs=20)
    alone = digests_without_ray(made)
    found, killed = {}, set[int]()
    before = set(processes("ray::MapWorker"))

    def alive() -> set[int]:
        return set(processes("ray::MapWorker")) - before - killed

    for index, replica, part in stream(made):
        found[index, replica] = digest(part)
        if index == 240:  # before all end
            until(lambda: len(alive()) == 2)  # others in place of those
        if index in (2, 120):
            pid = min(alive())
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.3)  # so that it is given blocks which it does not make
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    assert len(killed) == 2
    assert found == alone


@pytest.fixture
def feeds(cluster: None) -> Iterator[Callable[..., Any]]:
    """Feeds as actors, started at item 0, each for so many ranks."""
    made = []

    def make(shards: str, ranks: int = 1, **given: Any) -> Any:
        config = configure({"run": "r", "towers": ranks, **given})
        whole = fleet(shards, decide([{"CPU": 4}], config), towers=ranks, **given)
        feed = ray.remote(Feed).options(num_cpus=0, max_concurrency=8).remote(whole)
        made.append(feed)
        ray.get(feed.open.remote(0))
        return feed

    yield make
    for feed in made:
        ray.kill(feed)


def taken(feed: Any, start: int, stop: int) -> dict[tuple[int, int], str]:
    """Digests of the parts of some items, as a rank takes them."""
    found = {}
    for index in range(start, stop):
        refs = ray.get(feed.take.remote(index, 0, True))
        assert refs
        found[index, 0] = digest(unpack(*ray.get(refs)))
    return found


def test_a_feed_goes_on_over_fleets_of_other_sizes(
    shards: str, alone: dict[tuple[int, int], str], feeds: Callable[..., Any]
) -> None:
    feed = feeds(shards, augmenters="1:1")
    found = taken(feed, 0, 3)
    ray.get(feed.scale.remote("2:2"))
    found |= taken(feed, 3, 12)
    ray.get(feed.scale.remote("1:1"))
    found |= taken(feed, 12, len(alone))
    assert found == alone


def test_a_fleet_that_stalls_is_started_anew(
    shards: str,
    alone: dict[tuple[int, int], str],
    feeds: Callable[..., Any],
    processes: Callable[[str], list[int]],
) -> None:
    """Its only augmenter is stopped: it lives, holds its place, and brings nothing."""
    feed = feeds(shards, augmenters="1:1")
    found = taken(feed, 0, 3)
    for pid in processes("ray::MapWorker"):
        os.kill(pid, signal.SIGSTOP)
    found |= taken(feed, 3, len(alone))
    assert found == alone
    assert ray.get(feed.state.remote())["stalls"] >= 1


class Late:
    """A fleet whose parts from one on come late."""

    def __init__(self, made: Fleet, first: tuple[int, int]) -> None:
        self.made, self.first, self.due = made, first, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)

    def stream(self, start: int, watch: Watch) -> Iterator[tuple[int, int, Packed]]:
        for index, replica, part in self.made.stream(start, watch):
            if (index, replica) >= self.first:
                self.due.wait()
            yield index, replica, part


def test_replicas_get_an_item_once_all_its_parts_are_there(shards: str, cluster: None) -> None:
    """Or one would wait for the fleet, and another for that one, with a limit."""
    late = Late(fleet(shards, replicas=2, augmenters="1:1"), (2, 1))
    feed, found = Feed(late), []  # type: ignore[arg-type]
    feed.open(0)
    for key in (0, 0), (0, 1), (1, 0), (1, 1):
        assert feed.take(*key, True)
    first = threading.Thread(target=lambda: found.append(feed.take(2, 0, True)), daemon=True)
    first.start()
    until(lambda: (2, 0) in feed.window)
    first.join(0.5)
    assert not found
    late.due.set()
    first.join(60)
    assert found
    assert found[0]
    assert feed.stop() == 3  # and who has not got it yet does so all the same
    assert feed.take(2, 1, True)
    assert feed.take(3, 0, True) is None


class Starting:
    """A fleet whose streams take `seconds` to start, and whose store may be `away`, or whose
    streams may end by an `error`; both at the last replica's parts.
    """

    itinerary, seconds, away = range(1000), 0.0, ""
    error: Exception | None = None

    def __init__(self, replicas: int = 1) -> None:
        self.replicas, self.where = replicas, SimpleNamespace(mesh=Mesh(replicas, 1, 1))

    def stream(self, start: int, watch: Watch) -> Iterator[tuple[int, int, Packed]]:
        time.sleep(self.seconds)
        for index in self.itinerary[start:]:
            for replica in range(self.replicas):
                last = replica == self.replicas - 1
                if last and self.error:
                    raise self.error
                away = self.away if last else ""
                yield index, replica, Packed("pixels", "fault" if away else "rest", "node", away)


def test_a_store_that_is_away_is_waited_for_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = Starting()
    feed = Feed(fleet)  # type: ignore[arg-type]
    fleet.seconds, fleet.away = 0.02, "it does not answer"
    with feed.there:
        feed._begin()
    found: list[Any] = []
    rank = threading.Thread(target=lambda: found.append(feed.take(0, 0, True)), daemon=True)
    rank.start()
    until(lambda: feed.streams >= 5)  # each finds that it is away
    assert feed.state()["away"] == "it does not answer"
    fleet.away = ""
    rank.join(60)
    assert found == [["pixels", "rest"]]
    assert [feed.take(index, 0, True) for index in range(1, 40)] == [["pixels", "rest"]] * 39
    assert feed.state()["away"] == ""
    monkeypatch.setattr("workers.feed.PATIENCE", 0.3)
    fleet.away = "it is gone"
    begun, taken = time.monotonic(), 40
    while (last := feed.take(taken, 0, True)) == ["pixels", "rest"]:  # made before
        taken += 1
    assert last == ["pixels", "fault"]
    assert time.monotonic() - begun >= 0.3


@pytest.mark.parametrize("why", ["it is gone", ray.exceptions.RayError("a node is gone")])
def test_what_a_stream_brings_again_is_no_news(
    why: str | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each begins with the first replica's part, which is there."""
    monkeypatch.setattr("workers.feed.PATIENCE", 0.3)
    fleet = Starting(replicas=2)
    fleet.seconds = 0.02
    if isinstance(why, str):
        fleet.away = why
    else:
        fleet.error = why
    feed = Feed(fleet)  # type: ignore[arg-type]
    with feed.there:
        feed._begin()
    until(lambda: feed.failure or feed._has(0), 20)
    assert feed.failure is fleet.error
    assert feed.failure or feed.take(0, 1, True) == ["pixels", "fault"]


@pytest.mark.usefixtures("cluster")
def test_what_is_made_again_waits_for_a_store_too(
    shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = fleet(shards)
    feed, made = Feed(there), there.load(0, 0, {})
    answers = [replace(made, error="it is gone", away=True), made]
    monkeypatch.setattr(there, "load", lambda *_: answers.pop(0) if answers[1:] else answers[0])

    def again() -> Part:
        pixels, rest = ray.get(feed.again(0, 0, True))
        return unpack(pixels, rest)

    assert (again().batch.crops == made.batch.crops).all()
    monkeypatch.setattr("workers.feed.PATIENCE", 0.5)
    answers[:] = [replace(made, error="it is gone", away=True)]
    assert again().error == "it is gone"


def test_how_long_a_stream_took_to_start_is_no_measure_of_the_next() -> None:
    """Nodes may have been away meanwhile."""
    fleet = Starting()
    feed = Feed(fleet)  # type: ignore[arg-type]
    for fleet.seconds, items in (0.0, range(20)), (0.5, range(20, 40)):
        with feed.there:
            feed._begin()
        assert all(feed.take(index, 0, True) for index in items)
    assert feed.slowest < 0.5
    feed.row, feed.begun = 4, feed.begun - CALM_SECONDS
    assert all(feed.take(index, 0, True) for index in range(40, 60))
    assert feed.row == 0


def test_an_execution_that_ended_before_it_began_does_not_begin() -> None:
    watch = Watch()
    watch.end()
    with pytest.raises(RuntimeError, match="nobody wants"):
        watch.callback()().before_execution_starts(None)


class Leaving:
    """A fleet whose node leaves once all is made, and whose next stream brings nothing."""

    def __init__(self, made: Fleet) -> None:
        self.made, self.streams = made, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)

    def stream(self, start: int, watch: Watch) -> Iterator[tuple[int, int, Packed]]:
        self.streams += 1
        if self.streams == 1:
            for index, replica, part in list(self.made.stream(start, watch)):
                yield index, replica, replace(part, node="gone")
        elif self.streams == 2:
            threading.Event().wait()
        else:
            yield from self.made.stream(start, watch)


def test_a_stream_that_stalls_over_the_last_items_is_started_anew(
    shards: str, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.feed.STALL_SECONDS", 1.0)
    leaving = Leaving(fleet(shards, batch=64, epochs=1, augmenters="1:1"))
    feed, found = Feed(leaving), []  # type: ignore[arg-type]
    feed.open(0)
    until(lambda: leaving.streams >= 2)  # its node is missed
    assert feed.next == (len(leaving.itinerary), 0)

    def take() -> None:
        found.extend(feed.take(index, 0, True) for index in range(len(leaving.itinerary)))

    rest = threading.Thread(target=take, daemon=True)
    rest.start()
    rest.join(300)
    assert len(found) == len(leaving.itinerary)
    assert feed.state()["stalls"] >= 1  # actors of the next stream may take longer to start
    feed.stop()


def test_a_feed_stops_all_ranks_at_one_item(shards: str, feeds: Callable[..., Any]) -> None:
    feed = feeds(shards, ranks=2)
    assert all(ray.get(feed.take.remote(index, 0, True)) for index in range(4))
    # Also what nobody is to get any more.
    until(lambda: ray.get(feed.state.remote())["ready"] >= 6)
    assert ray.get(feed.stop.remote()) == 4
    # The other rank gets there too.
    assert all(ray.get(feed.take.remote(index, 0, True)) for index in range(4))
    assert ray.get(feed.take.remote(4, 0, True)) is None


def test_slow_towers_stop_the_fleet(shards: str, cluster: None) -> None:
    """What is made ahead is bounded however long nobody takes it."""
    made = fleet(shards, epochs=200, augmenters="1:8")
    refs = made.stream(0, watch := Watch())
    first = next(refs)
    counts = [0]
    while len(counts) < 4 or counts[-1] > counts[-4]:
        time.sleep(1)
        counts.append(sum(op.metrics.num_outputs_of_finished_tasks or 0 for op in watch.operators))
    assert first[:2] == (0, 0)
    most = store_bytes(made.config, made.crop, made.config.fleet[1]) // part_bytes(
        made.config, made.crop
    )
    # Ray Data looks at its limit before it starts tasks, and not at what they will add.
    assert 1 < counts[-1] < 2 * most < 200  # of 2,800
    refs.close()


@pytest.mark.parametrize("apart", [True, False])
def test_packing_keeps_all(apart: bool) -> None:
    batch = Batch(
        np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3),
        np.array([4, 5]),
        np.ones((2, 3), np.float32),
        np.array([7, 8]),
        1,
        ["a row is bad"],
    )
    made = pack(Part(batch, np.array([9, 11]), "", "node"), apart)
    part = unpack(made[0], made[-1])
    for name in NAMES:
        assert getattr(part.batch, name).tolist() == getattr(batch, name).tolist()
    assert (part.batch.skipped, part.batch.faults) == (1, ["a row is bad"])
    assert (part.places.tolist(), part.error, part.node) == ([9, 11], "", "node")
    assert np.shares_memory(part.batch.crops, batch.crops)  # no copy either way


def test_statistics_are_the_same_by_many_workers(shards: str, cluster: None) -> None:
    found = measure(open_dataset(shards), 72, "fail", {"CPU": 0.5})
    want = fleet(shards).dataset.rows("train")
    assert found.images == want
    again = measure(open_dataset(shards), 72, "fail", {"CPU": 1})
    for name in ("mean_image", "rgb_mean", "covariance", "eigenvectors"):
        assert getattr(found, name).tobytes() == getattr(again, name).tobytes()
