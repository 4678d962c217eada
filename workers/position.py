"""Where a run goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from workers.config import UserError
from workers.run import RunFolder
from workers.towers import Job


def position(folder: RunFolder, job: Job, known: Mapping[int, bool]) -> tuple[str | None, int]:
    """A run's last checkpoint, None if there is none yet, and the item of its itinerary to go on
    with: read from the checkpoint's progress, without its tensors, unless its step is `known`, and
    whether it has that step's evaluation.

    Raises UserError if what is read is damaged, not of the job's network and order of images, or
    has more steps than the job is to have.
    """
    kept, itinerary = folder.checkpoints(), job.itinerary
    if not kept:
        return None, 0
    step, last = kept[-1], folder.checkpoint(kept[-1])
    if step in known:
        return last, itinerary.after(step, known[step])
    from pipeline import checkpoint  # torch, which a supervisor mostly does without

    try:
        checkpoint.check(last, job.config.build(job.classes))
        progress = checkpoint.read_progress(last)
    except ValueError as error:
        raise UserError(str(error)) from None
    step, had = progress["step"], progress.get("order", {})
    for name, value in itinerary.order.items():
        if had.get(name, value) != value:
            raise UserError(
                f"{last} is of a run with {name} {had[name]}, not {value}: the images of its next "
                "batches would be others; a new run can start from its weights, by --init"
            )
    if step > itinerary.total_steps:
        raise UserError(
            f"{last} has done {step} steps, and the run is to have {itinerary.total_steps}: "
            "more --epochs or --steps"
        )
    return last, itinerary.after(step, has_evaluation(step, progress["evaluations"]))


def has_evaluation(step: int, evaluations: Iterable[Mapping[str, Any]]) -> bool:
    """Whether one of these evaluations is of the weights after `step`."""
    return any(evaluation["step"] == step for evaluation in evaluations)
