"""`towers plan`: what a training takes, counted from its table and from rates before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.description import Cost, describe, kept
from pipeline.mesh import Mesh
from pipeline.network import Network
from workers.config import Config, UserError
from workers.fleet import store_bytes
from workers.progress import megabytes, table
from workers.rates import Rates

PARTS = ("weights", "gradients", "velocities", "activations", "batch", "checkpoint")


def plan(
    network: Network,
    config: Config,
    mesh: Mesh,
    images: int,
    rates: Rates | None,
    *,
    price_towers: float = 0.0,
    price_augmenter: float = 0.0,
) -> dict[str, Any]:
    """What training on so many images takes: the keys of `towers plan --json`, bytes and seconds.

    `rates` None leaves out time and cost; prices are of an hour, of all towers together and of one
    augmenter. Raises UserError if the network does not divide over so many towers.
    """
    each = config.batch // mesh.replicas
    try:
        costs = describe(network, towers=mesh.towers, batch=each)
    except ValueError as error:
        raise UserError(str(error)) from None
    compute = getattr(torch, config.precision)
    memory = _memory(network, config, mesh, costs)
    steps = math.ceil(images / config.batch) * config.epochs
    steps = min(steps, config.steps or steps)
    first = _first_trained(config, len(costs))
    ways = [1 + (index > first) for index in range(len(costs))]  # forward, and backward if learnt
    frozen = sum(costs[index].parameters for index in config.frozen)
    high = config.fleet[1]
    if rates:
        high = min(high, max(config.fleet[0], math.ceil(rates.need)))
    result: dict[str, Any] = {
        "network": network.name,
        "mesh": str(mesh),
        "batch": config.batch,
        "images": images,
        "steps": steps,
        "memory": memory,
        "object_store_bytes": store_bytes(config, network.crop, high),
        "checkpoint_bytes": 4 * (2 * sum(cost.parameters for cost in costs) - frozen),
        "step_bytes": {
            "towers": sum(n * cost.sent for n, cost in zip(ways, costs, strict=True))
            * compute.itemsize
            // 4,
            "stages": [
                ways[part.start]
                * each
                * network.shapes[part.start - 1].units
                // mesh.towers
                * compute.itemsize
                for part in config.parts[1:]
            ],
            "replicas": max(line["gradients"] for line in memory) if mesh.replicas > 1 else 0,
        },
    }
    if rates:
        reached = rates.reached(high)
        seconds = steps * config.batch / reached
        result |= {
            "tower_rate": rates.towers,
            "augmenter_rate": rates.augmenter,
            "augmenters": high,
            "augmenters_needed": rates.need,
            "images_per_second": reached,
            "epoch_seconds": seconds * math.ceil(images / config.batch) / steps,
            "seconds": seconds,
            "cost": seconds / 3600 * (price_towers + high * price_augmenter),
        }
    return result


def _memory(
    network: Network, config: Config, mesh: Mesh, costs: Sequence[Cost]
) -> list[dict[str, Any]]:
    """Bytes of each part on the device of each stage, of one tower and one replica."""
    compute = getattr(torch, config.precision)
    keeps = kept(network, compute)
    for index in range(_first_trained(config, len(keeps))):
        keeps[index] = 0
    each = config.batch // mesh.replicas
    micro = -(-each // config.microbatches)
    found = []
    for stage, part in enumerate(config.parts):
        flying = config.microbatches  # micro-batches that a stage keeps at a time
        if config.pipeline == "1f1b":
            flying = min(flying, mesh.stages - stage)
        weights = sum(costs[index].weights for index in part)
        # A crossing keeps the other tower's half of its input too.
        crossed = sum(costs[index].sent for index in part) // each * compute.itemsize // 4
        trained = sum(costs[index].weights for index in part if index not in config.frozen)
        pixels = network.crop**2 * 3
        found.append(
            {
                "stage": stage,
                "layers": [network.layers[index].name for index in part],
                "weights": weights,
                "gradients": trained,
                "velocities": trained,
                "activations": (sum(keeps[index] for index in part) // mesh.towers + crossed)
                * micro
                * flying,
                "batch": each * pixels + micro * pixels * 4 if stage == 0 else 0,
                "checkpoint": weights + trained,
            }
        )
    return found


def _first_trained(config: Config, layers: int) -> int:
    """The first layer that is trained: those before need no backward pass."""
    return next(index for index in range(layers) if index not in config.frozen)


def text(result: dict[str, Any], rates: Rates | None) -> str:
    """A plan for a person."""
    heads = ("stage", "layers", *PARTS, "MB in all")
    rows: list[tuple[str, ...]] = [
        (
            str(line["stage"]),
            f"{line['layers'][0]} to {line['layers'][-1]}",
            *(megabytes(line[part]) for part in PARTS),
            megabytes(sum(line[part] for part in PARTS)),
        )
        for line in result["memory"]
    ]
    moved = result["step_bytes"]
    lines: list[tuple[str, ...]] = [
        ("steps", f"{result['steps']:,} of {result['batch']} images"),
        ("checkpoint, MB", megabytes(result["checkpoint_bytes"])),
        ("object store for batches, MB", megabytes(result["object_store_bytes"])),
        ("from one tower to the other, MB a step", megabytes(moved["towers"])),
        *(
            (f"between stages {n} and {n + 1}, MB a step", megabytes(count))
            for n, count in enumerate(moved["stages"])
        ),
        ("gradients over replicas, MB a step", megabytes(moved["replicas"])),
    ]
    if rates:
        exact = f" ({result['augmenters_needed']:.2f})"
        lines += [
            ("towers, images a second", f"{result['tower_rate']:,.0f}"),
            ("an augmenter, images a second", f"{result['augmenter_rate']:,.0f}"),
            (
                "augmenters so that no tower waits",
                f"{math.ceil(result['augmenters_needed'])}{exact}",
            ),
            (
                f"images a second with {result['augmenters']} augmenter(s)",
                f"{result['images_per_second']:,.0f}",
            ),
            ("an epoch", _time(result["epoch_seconds"])),
            ("all of it", _time(result["seconds"])),
            ("cost", f"{result['cost']:,.2f}"),
        ]
    about = (
        f"{result['network']} on {result['mesh']} (replicas x stages x towers), memory of one "
        "device in MB; from the first checkpoint on a copy of the weights and momentum too:\n"
    )
    if not rates:
        lines.append(("time and cost", "--measure, or --tower-rate and --augmenter-rate, tell"))
    shown = [line for line in lines if line[1] not in ("0.0", "0.00")]
    return f"{about}{table(rows, heads)}\n\n{table(shown)}"


def _time(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    return (
        f"{minutes // 60:,} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{minutes} min {left} s"
    )
