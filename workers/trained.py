"""A trained network out of a run, with all that it takes to use it anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.statistics import Statistics
from pipeline import NotANumber, checkpoint
from pipeline.evaluation import Classifier
from pipeline.network import Network
from pipeline.weights import shaped
from workers.config import Config, UserError, bare, configure
from workers.data import CLASSES, Classes, classes_of, kept_classes, known_statistics, training_data
from workers.run import CONFIG, METRICS, checkpoint_url, checkpoints, is_run, read_lines


class _OfRun(Classifier):
    """Says which run it is of that has diverged, if it has."""

    source = ""

    def _blocks(self, crops: Tensor, count: int) -> Tensor:
        try:
            return super()._blocks(crops, count)
        except NotANumber as error:
            raise UserError(f"{self.source}: {error}: it has diverged; take another step") from None


@dataclass(frozen=True)
class Trained:
    """The network of a run's checkpoint, as a value that travels.

    `weights` by whole-network names, NumPy arrays because Ray lets processes share those. `classes`
    and `statistics` are None where the run does not know them, as if made of foreign weights.
    """

    run: str
    step: int
    config: Config
    weights: dict[str, NDArray[Any]]
    classes: Classes | None
    statistics: Statistics | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights as tensors over the same memory."""
        return {name: torch.from_numpy(weight) for name, weight in self.weights.items()}

    @property
    def network(self) -> Network:
        """Its table."""
        last = self.config.build(1000).layers[-1].name
        return self.config.build(len(self.weights[f"{last}.bias"]))

    @property
    def shape(self) -> tuple[int, int]:
        """Sides in pixels that images are fitted to and that crops have."""
        return self.config.image, self.network.crop

    def classifier(self, device: str = "cpu", precision: str = "") -> Classifier:
        """It, ready for crops, in the run's own precision unless another is named. On the CPU the
        full layers' weights are not copied.
        """
        assert self.statistics
        made = _OfRun(
            self.network,
            self.tensors,
            torch.from_numpy(self.statistics.centre(self.network.crop)),
            scale=self.config.scale,
            compute=getattr(torch, precision or self.config.precision),
            device=device,
        )
        made.source = f"{self.run} step {self.step}"
        return made


Step = int | Literal["best"] | None
"""Of a checkpoint: its own, the one with the least top-1 error of those evaluated, the last one."""


def pick_step(run: str, step: Step) -> int:
    """The step that is meant. Raises UserError if there is no such checkpoint."""
    kept = checkpoints(run)
    if not kept:
        what = "has no checkpoint yet" if is_run(run) else "is no run"
        raise UserError(f"{run} {what}")
    if step == "best":
        lines = (line for line in read_lines(run, METRICS) if line["split"] != "train")
        errors = {line["step"]: line["top1_error"] for line in lines if line["step"] in kept}
        if not errors:
            raise UserError(f"{run}: none of its checkpoints was evaluated; --step N takes one")
        return min(errors, key=errors.__getitem__)
    if step is not None and step not in kept:
        raise UserError(
            f"{run}: no checkpoint of step {step}; there are {', '.join(map(str, kept))}"
        )
    return kept[-1] if step is None else step


def open_trained(run: str, step: Step = None) -> Trained:
    """The network of a run's last checkpoint, or of another one, from a run of any mesh.

    Raises UserError if there is no such checkpoint, it is damaged, or there is no configuration.
    """
    run = bare(run)
    step = pick_step(run, step)
    config, place = configure({}, f"{run}/{CONFIG}"), checkpoint_url(run, step)
    try:
        weights = checkpoint.load_weights(place)
        network = shaped(place, weights, config.build)
    except (checkpoint.Damaged, ValueError) as error:
        raise UserError(str(error)) from None
    classes, statistics = kept_classes(run), known_statistics(config.image, run)
    data = None if classes and statistics else training_data(run, config)
    if data and len(data.classes) == network.classes:  # or other data lies there now
        classes = classes or classes_of(data)
        statistics = statistics or known_statistics(config.image, data.root)
    if classes and len(classes.names) != network.classes:
        raise UserError(
            f"{run}/{CLASSES}: {len(classes.names)} classes, of the checkpoint {network.classes}; "
            "remove it, and `towers evaluate RUN --data SHARDS` makes it anew"
        )
    arrays = {name: weight.numpy() for name, weight in weights.items()}
    return Trained(run, step, config, arrays, classes, statistics)
