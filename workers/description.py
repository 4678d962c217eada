"""`towers describe`: the layer table as text and as values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.description import Cost, describe
from pipeline.network import Layer, Network
from workers.progress import table


def layer_table(network: Network, towers: int, batch: int) -> tuple[str, dict[str, Any]]:
    """The table of a network over so many towers for a batch, and the same for JSON."""
    costs = describe(network, towers=towers, batch=batch)
    rows = [_row(layer, cost) for layer, cost in zip(network.layers, costs, strict=True)]
    parameters, macs = sum(c.parameters for c in costs), sum(c.macs for c in costs)
    sent = sum(c.sent for c in costs)
    memory = sum(c.activations + 3 * c.weights for c in costs)
    rows.append(
        ("total", "", "", f"{parameters:,}", f"{macs:,}", _megabytes(sent), _megabytes(memory))
    )
    heads = ("layer", "what", "output", "parameters", "multiply-adds", "sent MB", "memory MB")
    text = table(rows, heads)
    text += (
        f"\n\n{network.name}: {network.crop}x{network.crop} RGB crops, {network.classes} classes, "
        f"{network.columns} column(s) on {towers} device(s), "
        f"{parameters // towers:,} parameters a device.\n"
        f"Parameters and multiply-adds (one image, forward) are of all columns. Sent: by one tower "
        f"to the other\nfor a batch of {batch} in float32, forward; as much again backward. "
        "Memory: "
        "on one device, the layer's\noutput for the batch, and weights with gradient and velocity."
    )
    result = {
        "network": network.name,
        "towers": towers,
        "batch": batch,
        "parameters": parameters,
        "parameters_per_device": parameters // towers,
        "macs": macs,
        "bytes_sent": sent,
        "layers": [asdict(cost) for cost in costs],
    }
    return text, result


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
        _megabytes(cost.sent) if cost.sent else "",
        _megabytes(cost.activations + 3 * cost.weights),
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"
