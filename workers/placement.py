"""Who sits where: pure decisions about resources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.mesh import Mesh
from workers.config import Config, UserError

TOWERS, AUGMENT = "towers", "augment"  # custom resources of nodes set aside for either
SHARE = 0.001  # of such a resource: it says where, its amount means nothing

Bundles = list[dict[str, float]]


class Lacking(UserError):
    """The nodes are too few. `wishes` are lists of bundles, any of which a cluster that can start
    nodes may be asked for, the first choice first.
    """

    def __init__(self, message: str, *wishes: Bundles) -> None:
        super().__init__(message)
        self.wishes = wishes


@dataclass(frozen=True)
class Placement:
    """Where a run's processes go.

    `tower` and `augmenter` are the Ray resources of one of each; `threads` is for a tower's torch.
    `apart`: towers keep off the nodes that are set aside for augmenters.
    """

    mesh: Mesh
    device: str
    tower: dict[str, float]
    augmenter: dict[str, float]
    threads: int
    apart: bool = False


def decide(nodes: Sequence[dict[str, float]], config: Config, runs: int = 0) -> Placement:
    """The placement of a run on nodes with these total resources.

    GPUs hold a tower each; without them towers share the CPUs with the augmenters, so that both
    fit even on two cores. Nodes with the resource `augment` take the augmenters, nodes with
    `towers` the towers, where there are such. So many `runs` like it fit side by side, if fewer
    GPUs than runs then on fractions of them; their augmenters are a pool's, which takes no CPU from
    them. Raises Lacking that says what is missing.
    """
    homes = homes_of(nodes)
    device, mesh = _towers(nodes, homes, config, runs)
    everyone = mesh.size * max(1, runs)
    gpu: dict[str, float] = {}
    if device == "cuda":
        homes = [node for node in homes if node.get("GPU", 0)]
        gpu["GPU"] = _gpu_share(homes, everyone)
    helpers = [node for node in nodes if AUGMENT in node]
    least = 0 if runs else config.fleet[0]
    apart = bool(helpers) and all(node not in homes for node in helpers)
    outside = [node for node in helpers or nodes if all(node is not home for home in homes)]

    def enough(share: float) -> bool:
        """For the towers, and where the augmenters are not apart for these too."""
        cpu = {"CPU": share}
        beside_them = apart or _fit([*homes, *outside], cpu) >= everyone + least
        return beside_them and _fit(homes, {**cpu, **gpu}) >= everyone

    share = _most(enough)
    help_share = _most(lambda share: _fit(helpers, {"CPU": share}) >= least) if apart else share
    if not share or not help_share:
        have = sum(node.get("CPU", 0) for node in nodes)
        near = ", a tower's beside its GPU" if gpu else ""
        wishes = [[{"CPU": 1.0}] * (everyone + least)]
        if config.device == "auto":
            wishes.insert(0, [{"GPU": 1.0}] * everyone)
        raise Lacking(
            f"not enough CPUs: {everyone} towers and {least} augmenters need at least "
            f"{(everyone + least) * _STEP:g}{near}, the cluster has {have:g}",
            *wishes,
        )
    tower = {"CPU": share, **gpu}
    if TOWERS in homes[0]:
        tower[TOWERS] = SHARE
    augmenter = {"CPU": 0 if runs else help_share}
    if helpers:
        augmenter[AUGMENT] = SHARE
    inside = 0 if apart else max(0, least - _fit(outside, {"CPU": share}))
    cpus = sum(node.get("CPU", 0) for node in homes) - inside * share
    threads = max(1, int(min(cpus / everyone, *_alone(homes, tower, everyone))))
    return Placement(mesh, device, tower, augmenter, threads, apart)


def _towers(
    nodes: Sequence[dict[str, float]],
    homes: Sequence[dict[str, float]],
    config: Config,
    runs: int,
) -> tuple[str, Mesh]:
    """What towers run on, and how many of them. Raises Lacking if there are not enough GPUs."""
    beside = max(1, runs)
    gpus = gpus_of(homes)
    device = config.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    towers = config.towers
    if towers is None:
        # Runs that share CPUs gain nothing from towers that wait for each other.
        few = 0 < gpus < 2 * beside if device == "cuda" else runs > 0
        towers = 1 if config.columns == 1 or few else 2
    mesh = Mesh(config.replicas, config.stages, towers)
    count = 1 if mesh.size == 1 else mesh.size * beside
    if device == "cuda" and gpus < count:
        where = " on nodes for towers" if len(homes) < len(nodes) else ""
        raise Lacking(
            f"not enough devices: {count} towers need {count} GPUs, the cluster has {gpus}"
            f"{where}; --towers 1 holds both towers in one process, --device cpu does without GPUs",
            [{"GPU": 1}] * count,
        )
    return device, mesh


def gpus_of(nodes: Sequence[dict[str, float]]) -> int:
    """How many GPUs nodes with these total resources have."""
    return sum(int(node.get("GPU", 0)) for node in nodes)


def _gpu_share(homes: Sequence[dict[str, float]], everyone: int) -> float:
    """The GPUs, or the fraction of one, of each tower. Raises Lacking if that is too small."""
    gpus = gpus_of(homes)
    if gpus >= everyone:
        return 1
    share = _most(lambda share: _fit(homes, {"GPU": share}) >= everyone)
    if not share:
        raise Lacking(
            f"not enough devices: {everyone} towers do not fit on {gpus} GPUs, "
            f"{1 / _STEP:g} each at most; take fewer runs at once",
            [{"GPU": 1}] * everyone,
        )
    return share


def _alone(
    homes: Sequence[dict[str, float]], tower: dict[str, float], everyone: int
) -> list[float]:
    """The cores that towers have for themselves on each of their nodes: none has another node's."""
    left, alone = everyone, []
    for node in sorted(homes, key=lambda node: -node.get("CPU", 0)):  # as Ray fills them
        here = min(left, _fit([node], tower))
        if here:
            alone.append(node["CPU"] / here)
            left -= here
    return alone


def side_by_side(nodes: Sequence[dict[str, float]], configs: Iterable[Config]) -> int:
    """How many runs like these there are at a time if nobody says: as many as have a GPU for each
    tower, or where there are none a CPU; one at least.
    """
    homes, configs = homes_of(nodes), list(configs)
    gpus = 0 if all(config.device == "cpu" for config in configs) else gpus_of(homes)
    count = gpus or int(sum(node.get("CPU", 0) for node in homes))
    most = max(config.replicas * config.stages * (config.towers or 1) for config in configs)
    return max(1, count // most)


def homes_of(nodes: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The nodes that towers are for: those marked so, or else not marked for others, or all."""
    marked = [node for node in nodes if TOWERS in node]
    return marked or [node for node in nodes if AUGMENT not in node] or list(nodes)


_STEP = 0.05


def _most(enough: Callable[[float], bool]) -> float:
    """The most that each may have, up to one, so that there is enough; 0 if there never is."""
    shares = (round(twentieths * _STEP, 2) for twentieths in range(20, 0, -1))
    return next(filter(enough, shares), 0.0)


def _fit(nodes: Sequence[dict[str, float]], needs: Mapping[str, float]) -> int:
    """How many processes with these needs fit on some nodes."""
    return sum(min(_fitting(node, kind, need) for kind, need in needs.items()) for node in nodes)


def _fitting(node: dict[str, float], kind: str, need: float) -> int:
    """How many processes fit on a node that need so much of a resource each."""
    has = node.get(kind, 0)
    if kind == "GPU" and need < 1:  # nobody gets parts of two
        return int(has) * int(1 / need + 1e-9)
    return int(has / need + 1e-9)


def seats(nodes: Sequence[str], mesh: Mesh) -> list[int]:
    """The bundle that each rank takes, given the node of each bundle.

    A replica sits on one node if one has room for it, else each pair of towers does if it can.
    """
    free: dict[str, list[int]] = {}
    for bundle, node in enumerate(nodes):
        free.setdefault(node, []).append(bundle)

    def take(count: int) -> list[int]:
        """Bundles of the fullest node that has so many, else of several."""
        fitting = [node for node in free if len(free[node]) >= count]
        if not fitting:
            step = mesh.towers if count > mesh.towers else 1
            return [bundle for _ in range(count // step) for bundle in take(step)]
        node = min(fitting, key=lambda node: len(free[node]))
        taken, free[node] = free[node][:count], free[node][count:]
        return taken

    return [bundle for _ in range(mesh.replicas) for bundle in take(mesh.stages * mesh.towers)]
