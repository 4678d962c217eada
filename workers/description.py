"""`towers describe`: the layer table as text and as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.description import Cost, describe
from pipeline.mesh import Mesh
from pipeline.network import Layer, Network
from workers.progress import megabytes, table


def layer_table(
    network: Network, mesh: Mesh, parts: Sequence[range], batch: int
) -> tuple[str, dict[str, Any]]:
    """The table of a network over a mesh for a batch, who sits where, and the same for JSON.

    `parts` are the layers of each stage.
    """
    towers, images = mesh.towers, batch // mesh.replicas
    costs = describe(network, towers=towers, batch=images)
    rows = [_row(layer, cost) for layer, cost in zip(network.layers, costs, strict=True)]
    parameters, macs = sum(c.parameters for c in costs), sum(c.macs for c in costs)
    sent = sum(c.sent for c in costs)
    memory = sum(c.activations + 3 * c.weights for c in costs)
    rows.append(
        ("total", "", "", f"{parameters:,}", f"{macs:,}", megabytes(sent), megabytes(memory))
    )
    heads = ("layer", "what", "output", "parameters", "multiply-adds", "sent MB", "memory MB")
    text = table(rows, heads)
    text += (
        f"\n\n{network.name}: {network.crop}x{network.crop} RGB crops, {network.classes} classes, "
        f"{network.columns} column(s) on {towers} device(s), "
        f"{parameters // towers:,} parameters a device.\n"
        f"Parameters and multiply-adds (one image, forward) are of all columns. Sent: by one tower "
        f"to the other\nfor a batch of {images} in float32, forward; as much again backward. "
        "Memory: "
        "on one device, the layer's\noutput for the batch, and weights with gradient and velocity."
    )
    ranks = _ranks(network, mesh, parts, costs)
    if mesh.stages > 1 or mesh.replicas > 1:
        seats: list[tuple[str, ...]] = [
            (
                str(r["rank"]),
                f"{r['replica']}, {r['stage']}, {'ab'[r['tower']]}",
                f"{r['layers'][0]} to {r['layers'][-1]}",
                f"{r['macs'] / macs * towers:.0%}",
                f"{r['parameters']:,}",
                megabytes(r["memory"]),
            )
            for r in ranks
        ]
        places = ("rank", "replica, stage, tower", "layers", "work", "parameters", "memory MB")
        text += f"\n\n{mesh} (replicas x stages x towers), {images} images a replica:\n"
        text += table(seats, places)
    result = {
        "network": network.name,
        "towers": towers,
        "batch": batch,
        "parameters": parameters,
        "parameters_per_device": parameters // towers,
        "macs": macs,
        "bytes_sent": sent,
        "mesh": str(mesh),
        "ranks": ranks,
        "layers": [asdict(cost) for cost in costs],
    }
    return text, result


def _ranks(
    network: Network, mesh: Mesh, parts: Sequence[range], costs: Sequence[Cost]
) -> list[dict[str, Any]]:
    """What each rank holds; memory as in the layer table."""
    found = []
    for rank in range(mesh.size):
        replica, stage, tower = mesh.place(rank)
        own = [costs[index] for index in parts[stage]]
        found.append(
            {
                "rank": rank,
                "replica": replica,
                "stage": stage,
                "tower": tower,
                "layers": [cost.name for cost in own],
                "macs": sum(cost.macs for cost in own) // mesh.towers,
                "parameters": sum(cost.parameters for cost in own) // mesh.towers,
                "memory": sum(cost.activations + 3 * cost.weights for cost in own),
            }
        )
    return found


def _row(layer: Layer, cost: Cost) -> tuple[str, ...]:
    what = [f"{layer.kernel}x{layer.kernel}/{layer.stride}" if layer.kind == "conv" else "full"]
    if layer.crosses:
        what.append("crosses")
    if layer.norms:
        what.append("LRN")
    if layer.pool:
        what.append(f"pool {layer.pool.size}/{layer.pool.stride}")
    if layer.dropout:
        what.append(f"dropout {layer.dropout:g}")
    shape = cost.output
    output = f"{shape.maps}x{shape.side}x{shape.side}" if layer.kind == "conv" else f"{shape.maps}"
    return (
        layer.name,
        ", ".join(what),
        output,
        f"{cost.parameters:,}",
        f"{cost.macs:,}",
        megabytes(cost.sent) if cost.sent else "",
        megabytes(cost.activations + 3 * cost.weights),
    )
