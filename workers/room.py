"""The cluster's nodes, and room on them: asked for, waited for, given back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
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

from workers.config import Config
from workers.placement import AUGMENT, Lacking, Placement, decide

PATIENCE = 60.0  # seconds that a cluster may take to make room
ON_THE_WAY = 1800.0  # seconds that it has for it while it is starting nodes


def cluster_nodes() -> list[dict[str, float]]:
    """The total resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


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


def nodes_of(group: PlacementGroup) -> list[str]:
    """The node of each bundle of a group that is ready."""
    found = placement_group_table(group)["bundles_to_node_id"]
    return [found[bundle] for bundle in range(len(found))]


def _no_room(what: str, need: dict[str, float]) -> Lacking:
    free = ray.available_resources()
    shown = ", ".join(f"{free.get(name, 0):g} {name}" for name in need)
    return Lacking(
        f"the cluster has no room for {what} with {_show(need)} each: "
        f"free now are {shown}; end other jobs or add nodes"
    )


def _show(resources: dict[str, Any]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
