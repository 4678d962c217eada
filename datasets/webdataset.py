"""WebDataset's tars: an image and its label stand side by side under one key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby

from datasets.archives import HEADERS, Member, tar_members
from datasets.images import is_image
from datasets.storage import opened

_LABELS = ("cls", "json")  # endings of the labels
_MAX_LABEL = 1 << 20  # bytes


def holds_samples(head: Sequence[Member]) -> bool:
    """Whether an image and a label stand under one key among a tar's first members."""
    labels = {_key(member) for member in head if _ending(member) in _LABELS}
    return any(is_image(member.name) and _key(member) in labels for member in head)


def samples(url: str) -> Iterator[tuple[Member, str | None]]:
    """The image of each key, and its label if there is one.

    Of several images it is the first, a photograph before masks and depths such as .seg.png.
    """
    with opened(url, **HEADERS) as file:
        for _, group in groupby(tar_members(file, url), _key):
            image, label = None, None
            for member in group:
                ending = _ending(member)
                if ending in _LABELS and member.length <= _MAX_LABEL:
                    file.seek(member.offset)
                    label = _label(file.read(member.length), ending) or label
                elif is_image(member.name) and (
                    image is None or ("." in _ending(image) and "." not in ending)
                ):
                    image = member
            if image:
                yield image, label


def _key(member: Member) -> str:
    """A member's name up to the first point of its last part."""
    folder, _, last = member.name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _ending(member: Member) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _label(data: bytes, ending: str) -> str | None:
    text = data.decode("utf-8", "replace").strip()
    if ending == "cls":
        return text or None
    try:
        values = json.loads(text)
        told = (values.get(key) for key in ("label", "cls", "class", "class_id"))
        return next(str(value) for value in told if type(value) in (str, int))
    except (ValueError, AttributeError, StopIteration):
        return None
