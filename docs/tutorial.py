"""Towers from first image to fine-tuned network, on a laptop in a few minutes.

    python docs/tutorial.py FOLDER

Each step is a function that the command line has too; the command stands above it. Everything goes
into FOLDER: shards, two runs, a contact sheet, an exported file, a report.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets.drawn import CLASSES, draw, write_drawn
from datasets.images import encode
from datasets.shards import write_manifest, write_split
from workers.commands.results import prediction
from workers.config import configure
from workers.evaluate import evaluate
from workers.neighbours import neighbours
from workers.predict import predict
from workers.report import report
from workers.supervisor import train
from workers.weights import export


def tutorial(folder: str, *, images: int = 6000, epochs: int = 8) -> dict[str, Any]:
    """All steps one after another; returns the results of the two trainings."""
    # 1. Data. Shards are folders of Parquet; of your own images `towers prepare photos/ SHARDS`
    # makes them. Here are drawn ones: ten shapes, each in a class of its own.
    shards = f"{folder}/shapes"
    write_drawn(shards, train=images, val=images // 6)

    # 2. Training. Two towers, processes that hold half of the network each, and augmenters that
    # crop for them. Kill any of these processes if you like.
    #     towers train FOLDER/shapes --network alexnet-mini --run FOLDER/run
    run = f"{folder}/run"
    given = {"network": "alexnet-mini", "epochs": epochs, "augmenters": "1:2"}
    first = train(configure({**given, "shards": shards, "run": run}))
    print(f"trained {first['steps']} steps, {first['images_per_second']:.0f} images a second")

    # 3. Evaluation: every image of the validation split once, ten crops of each.
    #     towers evaluate FOLDER/run --crops 10
    measured = evaluate([run], crops=10)
    print(f"{measured['images']} images: {measured['top1_error']:.1%} are taken for another shape")

    # 4. Prediction, of any image file.
    #     towers predict FOLDER/run FOLDER/star.jpg
    star = f"{folder}/star.jpg"
    with open(star, "wb") as file:
        file.write(encode(draw(1, "new", CLASSES.index("star"))[0]))
    for line in predict(run, [star]):
        print(prediction(line, "#"))

    # 5. What else looks like that to the network? The nearest training images, and a sheet of them.
    #     towers neighbours FOLDER/run FOLDER/star.jpg --output FOLDER/sheet.png
    near = neighbours(run, [star], output=f"{folder}/sheet.png")["images"][0]
    print(f"near {near['image']}: {', '.join(one['title'] for one in near['neighbours'])}")

    # 6. Export, for those who have torch and no Towers. The file beside it says how to use it.
    #     towers export FOLDER/run FOLDER/shapes.safetensors
    weights = f"{folder}/shapes.safetensors"
    export(run, weights)
    print(f"{weights}.md says how to load it in plain PyTorch")

    # 7. Fine-tuning, on few images of other classes: is a shape round? The convolutions stay as
    # they are, the last layer is drawn new.
    #     towers train FOLDER/round --init FOLDER/shapes.safetensors --freeze conv1:conv5 ...
    few = f"{folder}/round"
    write_round(few, max(60, images // 10))
    given |= {"init": weights, "freeze": "conv1:conv5", "rate": 0.005, "warmup": 0, "batch": 32}
    second = train(configure({**given, "shards": few, "run": f"{folder}/tuned"}))
    print(f"fine-tuned: {second['top1_error']:.1%} are taken for the other class")

    # 8. A page of curves, kernels and mistakes, of both runs.
    #     towers report FOLDER/run FOLDER/tuned --output FOLDER/report.html
    print(report([run, f"{folder}/tuned"], f"{folder}/report.html")["file"])
    return {"first": first, "second": second, "evaluated": measured}


def write_round(url: str, images: int) -> None:
    """Shards of drawn images in two classes."""
    names, curved = ("angular", "round"), {"disc", "ring", "crescent", "heart"}

    def record(split: str, number: int) -> tuple[bytes, str, int]:
        pixels, shape = draw(2, split, number)
        return encode(pixels), f"{number}.jpg", int(CLASSES[shape] in curved)

    splits = {
        split: write_split(url, split, (record(split, n) for n in range(count)), names)
        for split, count in (("train", images), ("val", images))
    }
    write_manifest(url, splits, names, size=72)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=8)
    tutorial(**vars(parser.parse_args()))
