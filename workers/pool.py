"""One fleet for several runs side by side: augmenters that make parts for whichever run asks.

A run alone has a Ray Data execution of its own, which grows and shrinks. Many small runs side by
side would start and end an augmenter each every minute; here all of them ask the same actors. What
an actor makes is the same pure function of (run, item, replica), so that nothing else changes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

import ray

from workers.parts import Packed, pack
from workers.placement import AUGMENT, SHARE

if TYPE_CHECKING:
    from datasets.augmentation import Loader
    from workers.fleet import Fleet

AHEAD = 2  # parts that a run has under way or asked for, an augmenter
AHEAD_BYTES = 256 << 20  # of all of these, if that is less


@dataclass(frozen=True)
class Pool:
    """What runs side by side share: `augmenters` are actors' handles, `runs` how many runs at most
    share the cluster's room for towers, of which a run reserves its part by its `name`. A value
    that travels to them.
    """

    runs: int
    augmenters: tuple[Any, ...]
    name: str = ""

    @classmethod
    def started(cls, runs: int, nodes: Sequence[dict[str, float]]) -> Pool:
        """A pool of an actor for each CPU of the nodes that are set aside for augmenters, of all
        nodes if none is.
        """
        homes = [node for node in nodes if AUGMENT in node] or list(nodes)
        count = max(1, int(sum(node.get("CPU", 0) for node in homes)))
        # They ask for no CPU, so that no run's towers ever wait for room that they hold.
        actor = ray.remote(PooledAugmenter).options(
            num_cpus=0,
            resources={AUGMENT: SHARE} if any(AUGMENT in node for node in nodes) else None,
            scheduling_strategy="SPREAD",
            max_restarts=-1,
            max_task_retries=-1,
        )
        return cls(runs, tuple(actor.remote(runs) for _ in range(count)))

    def end(self) -> None:
        """Ends the actors."""
        for augmenter in self.augmenters:
            ray.kill(augmenter)

    def parts(self, fleet: Fleet, blocks: Iterable[tuple[int, int]]) -> Iterator[Packed]:
        """The packed part of each (item, replica), in order, a bounded number of them ahead."""
        shared = [ray.put(fleet)]  # in a list, so that Ray does not send it with each call
        turns, waiting = cycle(self.augmenters), deque[list[Any]]()
        left = iter(blocks)
        most = min(AHEAD * len(self.augmenters), max(AHEAD, AHEAD_BYTES // fleet.part_bytes))
        while True:
            while len(waiting) < most and (block := next(left, None)):
                make = next(turns).make.options(num_returns=3 if fleet.apart else 2)
                waiting.append(make.remote(self.name, shared, *block))
            if not waiting:
                return
            pixels, *rest, told = waiting.popleft()
            yield Packed(pixels, rest[0] if rest else pixels, *ray.get(told))


class PooledAugmenter:
    """One actor of a pool, which keeps rows in memory of the last `keep` runs that it helped."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.node = ray.get_runtime_context().get_node_id()
        self.known: OrderedDict[str, tuple[str, Fleet, dict[str, Loader]]] = OrderedDict()

    def make(self, run: str, shared: list[Any], index: int, replica: int) -> tuple[Any, ...]:
        """The tables of a part, and the rest of `Packed`."""
        fleet, loaders = self._known(run, shared[0])
        part = fleet.load(index, replica, loaders)
        told = self.node, part.error if part.away else ""
        return *pack(replace(part, node=self.node), fleet.apart), told

    def _known(self, run: str, shared: Any) -> tuple[Fleet, dict[str, Loader]]:
        stream = shared.hex()
        if run not in self.known or self.known[run][0] != stream:  # another takes its place
            self.known[run] = stream, ray.get(shared), {}
        self.known.move_to_end(run)
        if len(self.known) > self.keep:
            self.known.popitem(last=False)
        return self.known[run][1:]
