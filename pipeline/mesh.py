"""The mesh (replica, stage, tower): who is who among the ranks, and their process groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads this module too, and torch takes seconds
    from torch.distributed.device_mesh import DeviceMesh

    from pipeline.schedule import Line


@dataclass(frozen=True)
class Mesh:
    """Replicas x stages x towers ranks, towers next to one another.

    Raises ValueError, with the numbers, if an axis is not a size that it can have.
    """

    replicas: int = 1
    stages: int = 1
    towers: int = 2

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas is {self.replicas}: at least 1")
        if self.stages < 1:
            raise ValueError(f"stages is {self.stages}: at least 1")
        if self.towers not in (1, 2):
            raise ValueError(f"towers is {self.towers}: 1 or 2")

    @property
    def size(self) -> int:
        return self.replicas * self.stages * self.towers

    def place(self, rank: int) -> tuple[int, int, int]:
        """(replica, stage, tower) of a rank."""
        rest, tower = divmod(rank, self.towers)
        replica, stage = divmod(rest, self.stages)
        return replica, stage, tower

    def check_batch(self, batch: int, microbatches: int) -> None:
        """Raises ValueError if a batch does not divide over replicas and micro-batches."""
        parts = self.replicas * microbatches
        if microbatches < 1 or batch < 1 or batch % parts:
            raise ValueError(
                f"a batch of {batch} does not divide over {self.replicas} replicas x "
                f"{microbatches} micro-batches: take a multiple of {max(parts, 1)}"
            )

    def groups(self, device: str) -> DeviceMesh | None:
        """The process groups, once `torch.distributed` is up; None for a single rank."""
        if self.size == 1:
            return None
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        if dist.get_world_size() != self.size:
            raise ValueError(f"{dist.get_world_size()} ranks for a mesh of {self.size}")
        sizes = (self.replicas, self.stages, self.towers)
        return init_device_mesh(device, sizes, mesh_dim_names=("replica", "stage", "tower"))

    def line(self, groups: DeviceMesh | None, timeout: float) -> Line | None:
        """The stages that this rank exchanges with; None if there is one stage. A collective."""
        if groups is None or self.stages == 1:
            return None
        import torch
        import torch.distributed as dist

        from pipeline.schedule import Line

        ranks = torch.arange(self.size).view(self.replicas, self.stages, self.towers)
        lines = ranks.transpose(1, 2).reshape(-1, self.stages).tolist()
        up = dist.new_subgroups_by_enumeration(lines)[0]
        assert up
        return Line(groups.get_group("stage"), up, timeout)

    def __str__(self) -> str:
        return f"{self.replicas}x{self.stages}x{self.towers}"
