"""Row groups from far away that a machine keeps: the same rows, fetched once by all processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets import DataError, augmentation, cache
from datasets.augmentation import Augmentation, Loader
from datasets.cache import GROUPS, PIXELS, GroupCache, PixelCache
from datasets.images import encode
from datasets.layout import Dataset
from datasets.rows import Rows
from datasets.shards import open_dataset, write_manifest, write_split

pytestmark = pytest.mark.usefixtures("place")

EACH = 5000  # bytes of an image, about
ROWS, PER_GROUP = 24, 2
ALL = 1e9


def write(folder: str, first: int = 0, rows: int = ROWS) -> Dataset:
    """Shards of two row groups each, of rows that hold no images."""
    images = [np.random.default_rng(first + i).bytes(EACH) for i in range(rows)]
    records = [(data, f"{i}.jpg", i % 2) for i, data in enumerate(images)]
    shards = write_split(
        folder, "train", records, ("a", "b"), rows_per_group=PER_GROUP, shard_bytes=4 * EACH
    )
    write_manifest(folder, {"train": shards}, ("a", "b"), size=20)
    return open_dataset(folder)


def as_url(dataset: Dataset) -> Dataset:
    """The same files on the disk, named as those of a store far away are."""
    shards = dataset.shards("train")
    far = tuple(replace(shard, path=f"file://{shard.path}") for shard in shards)
    return replace(dataset, splits={"train": far})


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return as_url(write(str(tmp_path / "shards")))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Row groups, by their numbers in their shards, that are read from Parquet."""
    numbers: list[int] = []
    read = pq.ParquetFile.read_row_group

    def noted(self: pq.ParquetFile, i: int, **more: object) -> pa.Table:
        numbers.append(i)
        return read(self, i, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    return numbers


def reader(data: Dataset, disk: float = ALL, **more: int) -> Rows:
    return Rows(data, "train", disk_bytes=disk, **more)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    reads=st.lists(st.lists(st.integers(0, ROWS - 1), unique=True), min_size=2, max_size=4),
    disk=st.sampled_from([0, 1, 3 * PER_GROUP * EACH, ALL]),
)
def test_rows_are_those_of_the_files(data: Dataset, reads: list[list[int]], disk: float) -> None:
    kept, plain = reader(data, disk, cache_groups=2), Rows(data, "train")
    for now in reads:
        rows = np.array(now, np.int64)
        assert kept.read(rows, then=np.array(reads[-1], np.int64)) == plain.read(rows)
    kept._threads.shutdown()  # what still comes would be counted by another test


def test_each_is_fetched_once_by_all_processes_together(data: Dataset, place: Path) -> None:
    program = f"""
import sys, tempfile
tempfile.tempdir = {str(place.parent)!r}
import numpy as np
import pyarrow.parquet as pq
from datasets.layout import Dataset, Shard
from datasets.rows import Rows
fetched, read = 0, pq.ParquetFile.read_row_group
def noted(*args, **more):
    global fetched
    fetched += 1
    return read(*args, **more)
pq.ParquetFile.read_row_group = noted
rows = Rows({data!r}, "train", disk_bytes={ALL})
print("ready", flush=True)
sys.stdin.readline()
found = rows.read(np.random.default_rng(int(sys.argv[1])).permutation({ROWS}))
images = sorted((record.row, record.image[:8].hex(), record.label) for record in found)
print(fetched, images)
"""
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    several = [subprocess.Popen([*command, str(seed)], **pipes) for seed in range(3)]  # type: ignore[call-overload]
    for process in several:
        assert process.stdout.readline() == "ready\n"
    said = [process.communicate("go\n")[0] for process in several]
    counts, images = zip(*(line.split(" ", 1) for line in said), strict=True)
    assert sum(map(int, counts)) == ROWS // PER_GROUP
    expected = [
        (r.row, r.image[:8].hex(), r.label) for r in Rows(data, "train").read(np.arange(ROWS))
    ]
    assert {*images} == {f"{expected}\n"}


def test_whoever_ends_while_it_fetches_holds_up_nobody(data: Dataset, place: Path) -> None:
    program = f"""
import os, sys, tempfile, time
tempfile.tempdir = {str(place.parent)!r}
from datasets.cache import GroupCache
from datasets.layout import Dataset, Shard
data = {data!r}
kept = GroupCache(data, "train", ["image", "label"], {ALL})
def fetch():
    (part,) = kept._folder.glob("*.part")
    part.write_bytes(b"half a row group")
    print("begun", flush=True)
    time.sleep(600)
kept.table(data.shards("train")[0], 0, fetch)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"begun\n"
        found: list[object] = []
        waiting = threading.Thread(target=lambda: found.extend(reader(data).read(np.arange(2))))
        waiting.start()
        waiting.join(0.5)
        assert not found
        other.kill()
        waiting.join(60)
    assert found == Rows(data, "train").read(np.arange(2))


def test_whoever_waited_for_what_has_gone_since_spoils_nothing(data: Dataset, place: Path) -> None:
    """It was kept, and removed for want of room, before the one that waited had its turn."""
    shard = data.shards("train")[0]
    one, other = (GroupCache(data, "train", ["image", "label"], ALL) for _ in range(2))
    tables = [pa.table({"image": [bytes([n]) * 9000] * 3}) for n in range(2)]
    path = one._path(shard, 0)
    assert path
    found: list[pa.Table] = []
    turn = one._turn(path)
    assert turn
    waiting = threading.Thread(
        target=lambda: found.append(other.table(shard, 0, lambda: tables[1]))
    )
    with turn:
        waiting.start()
        waiting.join(0.3)
        kept = one._keep(tables[0], turn, path)
        path.unlink()
    waiting.join(60)
    assert kept.equals(tables[0])  # of which nothing was overwritten
    assert found == [tables[1]]
    assert cache._mapped(path).equals(tables[1])


@pytest.mark.parametrize("left", [0, 100])
def test_what_is_damaged_is_fetched_again(
    left: int, data: Dataset, place: Path, fetched: list[int]
) -> None:
    reader(data).read(np.arange(2))
    (kept,) = (path for path in place.glob(f"*{GROUPS}/*") if path.name != "lock")
    os.truncate(kept, left)
    for _ in range(2):
        assert reader(data).read(np.arange(2)) == Rows(data, "train").read(np.arange(2))
    assert len(fetched) == 2 + 2


def test_what_is_larger_than_all_room_is_not_kept(data: Dataset, place: Path) -> None:
    assert len(reader(data, EACH).read(np.arange(ROWS))) == ROWS
    assert not sum(sizes(place))


def sizes(place: Path) -> list[int]:
    return [path.stat().st_size for path in place.glob(f"*{GROUPS}/*") if path.name != "lock"]


def test_only_so_many_bytes_are_kept_and_the_last_of_them(
    data: Dataset, place: Path, fetched: list[int]
) -> None:
    group = PER_GROUP * (EACH + 800)
    rows = reader(data, 3 * group, cache_groups=1)
    for row in range(0, ROWS, PER_GROUP):
        rows.read(np.array([row]))
        assert sum(sizes(place)) <= 3 * group
    assert len(sizes(place)) == 3
    fetched.clear()
    again = reader(data, 3 * group)
    again.read(np.arange(ROWS - 3 * PER_GROUP, ROWS))
    assert not fetched
    again.read(np.array([0]))
    assert fetched == [0]


def test_a_file_that_changed_is_fetched_again(data: Dataset, fetched: list[int]) -> None:
    reader(data).read(np.arange(ROWS))
    folder = Path(data.root)
    changed = as_url(write(str(folder), first=1000))
    assert reader(changed).read(np.arange(4)) == Rows(changed, "train").read(np.arange(4))
    assert len(fetched) == ROWS // PER_GROUP + 2 + 2


def test_what_was_kept_before_the_machine_started_is_fetched_again(
    data: Dataset, tmp_path: Path, fetched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader(data).read(np.arange(4))
    (tmp_path / "boot").write_text("of another start")
    monkeypatch.setattr(cache, "BOOT", str(tmp_path / "boot"))
    assert reader(data).read(np.arange(4)) == Rows(data, "train").read(np.arange(4))
    assert len(fetched) == 2 + 2 + 2


def test_other_columns_are_not_mistaken_for_these(data: Dataset) -> None:
    rows = np.arange(4)
    assert [r.label for r in reader(data).read(rows)] == [0, 1, 0, 1]
    unlabelled = Rows(data, "train", labelled=False, disk_bytes=ALL)
    assert [r.label for r in unlabelled.read(rows)] == [-1] * 4


def test_what_fails_is_said_and_asked_for_again(tmp_path: Path, data: Dataset) -> None:
    rows, path = reader(data), Path(data.shards("train")[0].path.removeprefix("file://"))
    path.rename(tmp_path / "away")
    with pytest.raises(DataError, match=f"{path.name}: no such file"):
        rows.read(np.arange(2))
    (tmp_path / "away").rename(path)
    assert rows.read(np.arange(2)) == Rows(data, "train").read(np.arange(2))
    path.unlink()
    assert len(reader(data, cache_groups=1).read(np.arange(4, 8))) == 4


def _full(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(cache, "FREE", 1.1)


def _refused(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    place.write_text("not a folder")


def _unwritable(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(os, "rename", refuse)


@pytest.mark.parametrize("hinder", [_full, _refused, _unwritable])
def test_without_a_place_each_is_fetched_by_who_wants_it(
    hinder: Callable[[pytest.MonkeyPatch, Path], None],
    data: Dataset,
    place: Path,
    fetched: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hinder(monkeypatch, place)
    first, second = (reader(data).read(np.arange(ROWS)) for _ in range(2))
    assert first == second
    assert len(fetched) == 2 * ROWS // PER_GROUP


def test_what_is_kept_is_used_when_the_disk_is_full(
    data: Dataset, fetched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader(data).read(np.arange(4))
    monkeypatch.setattr(cache, "FREE", 1.1)
    fetched.clear()
    rows = reader(data)
    rows.read(np.array([8]))
    rows.read(np.arange(4))
    assert fetched == [0]


def test_shards_that_are_near_are_read_where_they_are(tmp_path: Path, place: Path) -> None:
    near = write(str(tmp_path / "near"))
    assert len(reader(near).read(np.arange(ROWS))) == ROWS
    assert not place.exists()


@pytest.fixture
def pictures() -> Iterator[Dataset]:
    url = "memory://group-cache/set"
    rng = np.random.default_rng(0)
    images = [encode(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(8)]
    records = [(data, f"{i}.jpg", 0) for i, data in enumerate(images)]
    shards = write_split(url, "train", records, ("a",), rows_per_group=2)
    write_manifest(url, {"train": shards}, ("a",), size=20)
    yield open_dataset(url)
    fsspec.filesystem("memory").rm("/group-cache", recursive=True)


def load(data: Dataset, room: float, again: bool = True) -> np.ndarray:
    loader = Loader(data, "train", Augmentation(20, 12), None, seed=0, cache=room, again=again)
    return loader.load(np.arange(8), 0, True).crops


def test_the_next_run_finds_images_and_row_groups(
    pictures: Dataset, fetched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = PixelCache.whole(pictures, "train", 20)
    first = load(pictures, room * 1.5)
    assert len(fetched) == 4
    monkeypatch.setattr(augmentation, "decode", None)  # it would be called
    assert np.array_equal(load(pictures, room * 1.5), first)
    assert len(fetched) == 4


@pytest.mark.parametrize(
    ("room", "again", "images", "groups"),
    [
        (3.0, True, 1.0, 2.0),  # all images, the rest for row groups
        (0.5, True, 0.25, 0.25),  # not all: half for each
        (0.5, False, 0.0, 0.5),
        (0.0, True, 0.0, 0.0),
    ],
)
def test_images_and_row_groups_share_what_there_is(
    room: float,
    again: bool,
    images: float,
    groups: float,
    pictures: Dataset,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = PixelCache.whole(pictures, "train", 20)
    given: list[float] = []
    monkeypatch.setattr(GroupCache, "__init__", noted(GroupCache.__init__, given))
    load(pictures, room * whole, again)
    assert given == [groups * whole]
    assert sum(path.stat().st_size for path in place.glob(f"*{PIXELS}")) == images * whole


def noted(init: Callable[..., None], given: list[float]) -> Callable[..., None]:
    def made(self: object, *args: object) -> None:
        given.append(args[-1])  # type: ignore[arg-type]
        init(self, *args)

    return made


def test_what_nobody_uses_goes_with_the_next(tmp_path: Path, data: Dataset, place: Path) -> None:
    used = reader(data)
    gone = reader(as_url(write(str(tmp_path / "gone"), 500, 4)))
    for rows in (used, gone):
        rows.read(np.arange(4))
    assert len(list(place.iterdir())) == 2
    del gone, rows
    reader(as_url(write(str(tmp_path / "next"), 600, 4)))
    assert len(list(place.iterdir())) == 2
    assert len(sizes(place)) == 2  # of those that are used still
