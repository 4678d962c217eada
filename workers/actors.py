"""The processes of one attempt at a run: the feed and the towers; created, heard, found dead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from workers import cluster, placement, room
from workers.feed import Feed
from workers.fleet import Fleet
from workers.towers import Job, TowerActor

SECONDS, PATIENCE = 5.0, 60.0  # for news of a death: usually, and if a node may have gone


class Actors:
    """A feed and a tower actor for each rank, in the bundles of a placement group.

    Use it as a context: the actors are killed at its end.
    """

    def __init__(self, job: Job, fleet: Fleet, group: Any) -> None:
        mesh = job.placement.mesh
        seats = [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            for bundle in placement.seats(room.nodes_of(group), mesh)
        ]
        # Beside the first tower, so that the feed does not go with a node that only augments. A
        # rank may ask for a part anew while its call for the next one waits.
        self.feed = (
            ray.remote(Feed)
            .options(num_cpus=0, max_concurrency=2 * mesh.size + 4, scheduling_strategy=seats[0])
            .remote(fleet)
        )
        self.towers = [self._tower(job, rank, seat) for rank, seat in enumerate(seats)]

    @staticmethod
    def _tower(job: Job, rank: int, seat: PlacementGroupSchedulingStrategy) -> Any:
        resources = dict(job.placement.tower)
        return (
            ray.remote(TowerActor)
            .options(
                num_cpus=resources.pop("CPU"),
                num_gpus=resources.pop("GPU", 0),
                resources=resources,
                scheduling_strategy=seat,
            )
            .remote(job, rank)
        )

    def __enter__(self) -> Actors:
        return self

    def __exit__(self, *_: Any) -> None:
        end(self.feed)
        for actor in self.towers:
            ray.kill(actor)

    def reports(self, start: int) -> Iterator[dict[str, Any]]:
        """Has the towers train from item `start` on; what they yield, as it comes, until all have
        ended; {} once a second if nothing does.

        Raises what one of them raised.
        """
        streams = [
            tower.train.options(num_returns="streaming").remote(self.feed, start)
            for tower in self.towers
        ]
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, timeout=1)
            if not ready:
                yield {}
            for stream in ready:
                try:
                    yield ray.get(next(stream))
                except StopIteration:
                    streams.remove(stream)

    def lost(self, error: BaseException | None) -> list[str]:
        """Names of the actors that are dead after an error, given some time for the news to arrive;
        none if it is this process that has lost its Ray.
        """
        named = [("the feed", self.feed)]
        named += [(f"tower rank {rank}", tower) for rank, tower in enumerate(self.towers)]
        deadline = time.monotonic() + (PATIENCE if _of_peers(error) else SECONDS)
        lost: list[str] = []
        while not (lost or cluster.lost()) and time.monotonic() < deadline:
            for name, actor in named:
                try:
                    ray.get(actor.__ray_ready__.remote(), timeout=0.5)
                except ray.exceptions.GetTimeoutError:
                    continue  # busy, and so alive
                except ray.exceptions.RayActorError:
                    lost.append(name)
        if not lost and isinstance(error, ray.exceptions.ActorUnavailableError):
            lost.append("the connection to an actor")
        return lost


def end(feed: Any) -> None:
    """Kills a feed, once it has let go of the nodes that its fleet asked for."""
    with suppress(ray.exceptions.RayError):  # it may be dead
        ray.get(feed.release.remote(), timeout=SECONDS)
    ray.kill(feed)


def _of_peers(error: BaseException | None) -> bool:
    """Whether an error is what a rank sees when another one's node is gone."""
    if isinstance(error, ray.exceptions.RayActorError):
        return True
    words = ("connection", "peer", "socket", "nccl", "broken pipe")
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
