"""What the cluster has, and who sits where: pure decisions about resources, then Ray's group."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.sdk import GcsClient, get_cluster_status
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

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
    gpus = _gpus(homes)
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


def _gpus(nodes: Sequence[dict[str, float]]) -> int:
    return sum(int(node.get("GPU", 0)) for node in nodes)


def _gpu_share(homes: Sequence[dict[str, float]], everyone: int) -> float:
    """The GPUs, or the fraction of one, of each tower. Raises Lacking if that is too small."""
    gpus = _gpus(homes)
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


def cluster_nodes() -> list[dict[str, float]]:
    """The total resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


PATIENCE = 60.0  # seconds that a cluster may take to make room
ON_THE_WAY = 1800.0  # seconds that it has for it while it is starting nodes


def place(config: Config, say: Callable[[str], object], runs: int = 0) -> Placement:
    """`decide` on the cluster's nodes, or on those that it starts for this: `ray up` returns when
    the head is there, and a node type may have no node before it is asked for.

    Raises UserError if nodes are missing and the cluster starts none.
    """
    try:
        return decide(cluster_nodes(), config, runs)
    except Lacking as error:
        lacking = error
    if not (_autoscaler().autoscaler_state_version or _starting()):
        raise lacking
    say("waiting for nodes that the cluster is starting")

    def there() -> bool:
        with suppress(Lacking):
            return bool(decide(cluster_nodes(), config, runs))
        return False

    def came(group: PlacementGroup) -> bool:
        """Whether nodes for it came, or others that do too."""
        return _awaited(group, lambda: _feasible(group) and not there()) or there()

    for wish in lacking.wishes:
        group = placement_group(wish)  # which is what an autoscaler starts nodes for
        try:
            if came(group):
                break
        finally:
            remove_placement_group(group)
    return decide(cluster_nodes(), config, runs)


def _autoscaler() -> Any:
    """What Ray's autoscaler told last, if there is one: Ray's AutoscalingState."""
    reply = GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status()
    return GetClusterStatusReply.FromString(reply).autoscaling_state


def _feasible(group: PlacementGroup) -> bool:
    """Whether the autoscaler has not said that no nodes of its would be enough."""
    refused = _autoscaler().infeasible_gang_resource_requests
    return not any(group.id.hex() in request.details for request in refused)


def _starting() -> bool:
    """Whether Ray's autoscaler, if there is one, has asked for nodes that have not come yet."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    first = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")  # Ray's first autoscaler
    report = first.get("autoscaler_report") or {}
    kinds = "pending_launches", "pending_nodes"
    return any(getattr(status, kind) or report.get(kind) for kind in kinds)


def settle() -> None:
    """Returns once Ray's autoscaler has heard what executions of Ray Data in this process ask for,
    or no longer do: a wish that a process has not taken back outlives it for three minutes.
    """
    # Here, as Ray Data takes a second to import, which towers do without.
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

    ray.get(get_or_create_autoscaling_coordinator().__ray_ready__.remote())


def _awaited(group: PlacementGroup, check: Callable[[], object] = lambda: None) -> bool:
    """Whether the cluster makes room for a group: in a minute, or later if it is starting nodes.
    `check` is called meanwhile, and may raise, or end it by False.
    """
    began = last = time.monotonic()
    while not group.wait(0.5):
        if check() is False:
            return False
        now = time.monotonic()
        if _starting():
            last = now
        if now - last > PATIENCE or now - began > ON_THE_WAY:
            return False
    return True


def reserve(
    placement: Placement, name: str = "", check: Callable[[], object] = lambda: None
) -> PlacementGroup:
    """A bundle for each tower, in the order of ranks, the towers of a pair together if they can be;
    in place of what this job had reserved by this `name` before, if it has one.

    Raises UserError if the cluster does not make room for them and one augmenter, and what `check`
    raises, which is called while it waits.
    """
    bundles = [placement.tower] * placement.mesh.size
    away = [n["NodeID"] for n in ray.nodes() if n["Alive"] and AUGMENT in n["Resources"]]
    selector = {"ray.io/node-id": f"!in({','.join(away)})"} if placement.apart else {}
    free(name)
    group = placement_group(bundles, "PACK", name, bundle_label_selector=[selector] * len(bundles))
    try:
        if not _awaited(group, check):
            raise _no_room(f"{placement.mesh.size} towers", placement.tower)
        await_room("an augmenter", placement.augmenter, check)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def free(name: str) -> None:
    """Gives back what this job has reserved by a name, if anything: Ray does so when the job ends,
    not when the process is killed that reserved it.
    """
    with suppress(ValueError):
        if name:
            remove_placement_group(get_placement_group(name))


def await_room(
    what: str, need: dict[str, float], check: Callable[[], object] = lambda: None
) -> None:
    """Returns once some node has these resources free, for which Ray Data would wait for ever
    without a word. Raises UserError if the cluster makes no room, and what `check` raises.
    """
    if not any(need.values()):
        return
    group = placement_group([need])  # which is what an autoscaler starts a node for
    try:
        if not _awaited(group, check):
            raise _no_room(what, need)
    finally:
        remove_placement_group(group)


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


def nodes_of(group: PlacementGroup) -> list[str]:
    """The node of each bundle of a group that is ready."""
    found = placement_group_table(group)["bundles_to_node_id"]
    return [found[bundle] for bundle in range(len(found))]


def _no_room(what: str, need: dict[str, float]) -> UserError:
    free = ray.available_resources()
    shown = ", ".join(f"{free.get(name, 0):g} {name}" for name in need)
    return UserError(
        f"the cluster has no room for {what} with {_show(need)} each: "
        f"free now are {shown}; end other jobs or add nodes"
    )


def _show(resources: dict[str, Any]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
