"""The feed: each batch of the fleet goes to the towers once, in order, both of a pair alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray

from datasets.augmentation import Loader
from workers.fleet import Fleet
from workers.parts import READ_AHEAD, Packed, pack
from workers.patience import PAUSES
from workers.watch import Watch

STALL_SECONDS = 10.0
"""Without a batch that ranks wait for, before the fleet is started anew; longer for slow fleets."""

FIRST_SECONDS = 60.0
"""The same before the first batch, while actors start."""

CALM_SECONDS = 600.0
"""That a stream goes on for before the next one that stalls is found out as soon as the first."""

PATIENCE = sum(PAUSES)
"""Seconds that a store is waited for which fails, by one stream after the other."""

TRIES = 3  # streams in a row that may break before they bring anything


class Feed:
    """A Ray actor that runs the fleet ahead of the towers by a bounded number of batches.

    `open` starts at an item; then each rank `take`s each item once. Only references pass through
    here, the batches themselves go from an augmenter's node to the towers'. The stream of the fleet
    is disposable: it is dropped, and another one goes on at the next item, when the fleet's size is
    changed, when a node of it is lost, when a store fails, when it stalls and when it breaks.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.watch = fleet, Watch()
        mesh = fleet.where.mesh
        # Of a part's pixels, and of the rest of it.
        self.takers = mesh.towers, mesh.towers * mesh.stages
        self.there = threading.Condition()
        self.window: dict[tuple[int, int], _Held] = {}
        self.failure: BaseException | None = None
        self.next = (0, 0)  # item and replica that no stream has brought yet
        self.taken = -1  # last item that a rank has
        self.end: int | None = None  # first item that nobody gets any more
        self.asked = 0  # ranks that wait for something now
        self.streams = 0
        self.begun = self.moved = time.monotonic()  # the stream; when it last brought something
        self.slowest = FIRST_SECONDS / 4  # seconds that one ever took between two parts
        self.came = False  # whether a part ever did
        self.stalls, self.row = 0, 0  # streams that stalled; those since there was a calm
        self.broken = 0  # streams that broke since a part came
        self.nodes: set[str] = set()  # that this stream has parts of
        self.known: set[str] = set()  # the same of all streams, those that are still there
        self.lost: list[str] = []  # and those that are gone
        self.loaders: dict[str, Loader] = {}
        self.loading = threading.Lock()
        self.away, self.since = "", 0.0  # how a store failed that is waited for, and since when

    def open(self, start: int) -> None:
        """Starts a stream at item `start`."""
        with self.there:
            self.next, self.taken = (start, 0), start - 1
            self._begin()
        threading.Thread(target=self._guard, daemon=True).start()

    def scale(self, augmenters: str) -> None:
        """Goes on with a fleet of another size, MIN:MAX, from the next item."""
        with self.there:
            self.fleet.config = replace(self.fleet.config, augmenters=augmenters)
            self._begin()

    def stop(self) -> int:
        """Ends all ranks before one item, the first that none of them has; returns it."""
        with self.there:
            if self.end is None:
                self.end = self.taken + 1
            self.there.notify_all()
            return self.end

    def release(self) -> None:
        """Lets the nodes go that the fleet has asked for; it is not to be used any more."""
        self.watch.release()

    def _begin(self) -> None:
        """A new stream at the first item that is missing, and an end to the one before; the lock is
        held.
        """
        self.streams += 1
        self.begun = self.moved = time.monotonic()
        self.nodes = set()
        # It may wait for an augmenter that never comes back, so it is not left to end by itself.
        threading.Thread(target=self.watch.end, daemon=True).start()
        self.watch = Watch()
        start = min((key for key, held in self.window.items() if not held.part), default=self.next)
        arguments = self.streams, self.fleet.stream(start[0], self.watch)
        threading.Thread(target=self._pull, args=arguments, daemon=True).start()
        self.there.notify_all()

    def _pull(self, number: int, stream: Iterator[tuple[int, int, Packed]]) -> None:
        try:
            for index, replica, part in stream:
                key = index, replica
                with self.there:
                    while not (self._unwanted(number) or key < self.next or self._room()):
                        self.there.wait()
                    if self._unwanted(number):
                        return
                    now = time.monotonic()
                    if key >= self.next:
                        self.window[key] = _Held(*self.takers)
                        more = replica + 1 < self.fleet.replicas
                        self.next = (index, replica + 1) if more else (index + 1, 0)
                    held = self.window.get(key)
                    if held and not held.part:  # else a stream before brought it: no news
                        if part.away:
                            self.away, self.since = part.away, self.since or now
                            if now - self.since < PATIENCE:
                                self._begin()  # with the missing part: blocks ahead may lack too
                                return
                        self.away, self.since, self.broken = "", 0.0, 0
                        held.part = part
                    if self.nodes and self.asked:  # else that was the start of actors
                        self.slowest = max(self.slowest, now - self.moved)
                    elif not self.came:
                        self.came, self.slowest = True, 0.0
                    if now - self.begun > CALM_SECONDS:
                        self.row = 0
                    self.moved = now
                    self.nodes.add(part.node)
                    self.known.add(part.node)
                    self.there.notify_all()
        except BaseException as error:
            with self.there:
                if self._unwanted(number):
                    return
                self.broken += 1
                if isinstance(error, ray.exceptions.RayError) and self.broken < TRIES:
                    self._begin()  # blocks may be lost with a node
                else:
                    self.failure = error
                    self.there.notify_all()
        finally:
            stream.close()  # type: ignore[attr-defined]

    def _unwanted(self, number: int) -> bool:
        return number != self.streams or self._complete()

    def _complete(self) -> bool:
        """Whether nobody needs anything more of a stream."""
        return self.end is not None and self._whole(self.end)

    def _whole(self, end: int) -> bool:
        """Whether all parts of the items before `end` were brought, and none is lost again."""
        return self.next >= (end, 0) and all(
            held.part for key, held in self.window.items() if key < (end, 0)
        )

    def _room(self) -> bool:
        return len(self.window) < READ_AHEAD * self.fleet.replicas

    def _guard(self) -> None:
        """Drops a stream whose node is lost, or that brings nothing while ranks wait: Ray Data may
        wait for ever for an actor whose node has left.
        """
        while self.failure is None:
            time.sleep(0.5)
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            with self.there:
                if self._complete():
                    return
                if gone := self.known - alive:
                    self._lose(gone)
                    continue
                done = self._whole(len(self.fleet.itinerary))
                limit = max(STALL_SECONDS, 4 * self.slowest) * 2 ** min(self.row, 4)
                if done or not self.asked or time.monotonic() - self.moved < limit:
                    continue
                self.stalls += 1
                self.row += 1
                self._begin()

    def _lose(self, nodes: set[str]) -> None:
        """What these nodes had made and nobody took is made again; the lock is held."""
        self.lost += sorted(nodes)
        self.known -= nodes
        missing = [held for held in self.window.values() if held.part and held.part.node in nodes]
        for held in missing:
            held.part = None
        if missing or nodes & self.nodes:
            self._begin()

    def take(self, index: int, replica: int, pixels: bool) -> list[Any] | None:
        """A list (so that Ray does not resolve them) of the references to a replica's part: its
        pixels, None for a stage that needs none, and the rest. None if the run ends before it.

        It waits for the parts of all replicas: one that had its own would wait for the others where
        ranks wait for each other, which has a limit, and the fleet may be gone for longer. Raises
        what ended the stream, if it ended before this item.
        """
        key = index, replica
        with self.there:
            self.asked += 1
            self.there.notify_all()
            self.there.wait_for(lambda: self._has(index) or self.failure or self._over(index))
            self.asked -= 1
            if self._over(index):
                return None
            if not self._has(index):
                assert self.failure
                raise self.failure
            held = self.window[key]
            assert held.part
            self.taken = max(self.taken, index)
            taken = [held.part.pixels if pixels else None, held.part.rest]
            held.pixels_left -= pixels
            held.left -= 1
            if not held.pixels_left:  # their memory is free once the first stage is done with them
                held.part = replace(held.part, pixels=None)
            if not held.left:
                del self.window[key]
            self.there.notify_all()
        return taken

    def again(self, index: int, replica: int, pixels: bool) -> list[Any]:
        """What `take` gave, made anew in this process: for a rank that could not fetch it, because
        a node went that held it. The plan is pure, so it is the same.
        """
        begun = time.monotonic()
        with self.loading:  # both towers of a pair may ask
            while (part := self.fleet.load(index, replica, self.loaders)).away:
                if time.monotonic() - begun > PATIENCE:
                    break
                time.sleep(1)
        part = replace(part, node=ray.get_runtime_context().get_node_id())
        made = [ray.put(table) for table in pack(part, self.fleet.apart)]
        return [made[0] if pixels else None, made[-1]]

    def _has(self, index: int) -> bool:
        """Whether each part of an item is here, or was taken by all who need it."""
        keys = [(index, replica) for replica in range(self.fleet.replicas)]
        held = [self.window[key] for key in keys if key in self.window]
        return keys[-1] < self.next and all(one.part for one in held)

    def _over(self, index: int) -> bool:
        return self.end is not None and index >= self.end

    def state(self) -> dict[str, Any]:
        """`augmenters` that run now, `nodes` that this stream has parts of, `ready` batches,
        `stalls` of the fleet so far, nodes that made parts and are `lost`, how a store failed that
        is `away`.
        """
        with self.there:
            return {
                "augmenters": self.watch.augmenters,
                "nodes": sorted(self.nodes),
                "ready": sum(held.part is not None for held in self.window.values()),
                "stalls": self.stalls,
                "lost": list(self.lost),
                "away": self.away,
            }


@dataclass
class _Held:
    """A part in the window, None if it was lost; and how many ranks have not taken it yet."""

    pixels_left: int
    left: int
    part: Packed | None = None
