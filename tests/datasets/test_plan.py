"""The plan loses no row and repeats none, and a run resumes where it stopped."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.plan import Item, Itinerary, Plan

groups = st.lists(st.integers(0, 40), max_size=30)
small = st.integers(1, 50)


@given(groups, small, st.integers(0, 2**32), st.integers(0, 90), small)
def test_an_epoch_has_every_row_once(
    groups: list[int], batch: int, seed: int, epoch: int, window: int
) -> None:
    plan = Plan(groups, batch, seed=seed, epoch=epoch, window=window)
    batches = [plan.batch_rows(k) for k in range(plan.batches)]
    rows = np.concatenate([np.empty(0, np.int64), *batches])
    assert rows.dtype == np.int64
    assert sorted(rows.tolist()) == list(range(sum(groups)))
    assert all(len(b) == batch for b in batches[:-1])


@given(groups.filter(sum), small, st.integers(0, 9), st.data())
def test_a_batch_does_not_depend_on_what_was_asked_before(
    groups: list[int], batch: int, seed: int, data: st.DataObject
) -> None:
    def plan() -> Plan:
        return Plan(groups, batch, seed=seed, epoch=1, window=16)

    used = plan()
    for k in data.draw(st.lists(st.integers(0, used.batches - 1), max_size=8)):
        assert used.batch_rows(k).tolist() == plan().batch_rows(k).tolist()


def test_rows_stay_within_windows_of_permuted_groups() -> None:
    plan = Plan([10] * 20, 30, seed=0, epoch=0, window=25)
    touched = [set((plan.batch_rows(k) // 10).tolist()) for k in range(plan.batches)]
    assert all(len(t) == 3 for t in touched[:-1])
    assert len(set().union(*touched)) == 20


def test_seed_and_epoch_change_the_order() -> None:
    orders = {
        Plan([64] * 40, 128, seed=s, epoch=e).batch_rows(0).tobytes()
        for s in range(3)
        for e in range(3)
    }
    assert len(orders) == 9


def test_the_order_is_the_same_for_ever() -> None:
    """A promise: a run that one version checkpointed sees the same batches when a later version
    resumes it. The second plan has the window that all runs have.
    """
    plan = Plan([4] * 4, 8, seed=0, epoch=0, window=8)
    assert plan.batch_rows(0).tolist() == FIRST_BATCH
    plan = Plan([64] * 100, 4, seed=0, epoch=0)
    assert plan.batch_rows(0).tolist() == FIRST_OF_A_RUN


FIRST_BATCH = [10, 6, 8, 4, 11, 7, 5, 9]
FIRST_OF_A_RUN = [2093, 3633, 2074, 1984]


def test_imagenet_plans_in_less_than_a_second() -> None:
    start = time.perf_counter()
    plan = Plan([64] * 20_019, 128, seed=0, epoch=0)
    assert len(plan.batch_rows(plan.batches // 2)) == 128
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch is 0: 1 or more"),
        ({"window": 0}, "window is 0: 1 or more"),
        ({"groups": [3, -1]}, "groups has one of -1 rows: 0 or more"),
    ],
)
def test_plan_refuses(change: dict[str, object], message: str) -> None:
    arguments = {"groups": [3], "batch": 2, "seed": 0, "epoch": 0} | change
    with pytest.raises(ValueError, match=message):
        Plan(**arguments)  # type: ignore[arg-type]


def test_plan_has_no_batch_beyond_its_last() -> None:
    with pytest.raises(IndexError, match="batch 2 of 2"):
        Plan([3], 2, seed=0, epoch=0).batch_rows(2)


runs = st.builds(
    lambda train, held_out, batch, epochs, steps: (
        Itinerary(
            train,
            ("val", held_out) if held_out is not None else None,
            batch=batch,
            seed=0,
            epochs=epochs,
            steps=steps,
        ),
        (train, held_out, batch, epochs, steps),
    ),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.none() | st.lists(st.integers(0, 9), max_size=4),
    st.integers(1, 8),
    st.integers(1, 4),
    st.none() | st.integers(1, 40),
)


@given(runs)
@settings(max_examples=200)
def test_an_itinerary_is_the_loop_written_out(run) -> None:  # type: ignore[no-untyped-def]
    itinerary, (train, held_out, batch, epochs, steps) = run
    per_epoch = -(-sum(train) // batch)
    total = min(steps or epochs * per_epoch, epochs * per_epoch)
    passes = -(-sum(held_out or []) // batch)
    expected, step = [], 0
    for epoch in range(epochs):
        plan = Plan(train, batch, seed=0, epoch=epoch)
        for k in range(per_epoch):
            if step == total:
                break
            step += 1
            last = k == per_epoch - 1 or step == total
            expected.append((Item("train", epoch, k, step, last), plan.batch_rows(k).tolist()))
            if last:
                for b in range(passes):
                    rows = list(range(b * batch, min((b + 1) * batch, sum(held_out))))
                    expected.append((Item("val", epoch, b, step, b == passes - 1), rows))
    assert itinerary.total_steps == total
    assert len(itinerary) == len(expected)
    for i, (item, rows) in enumerate(expected):
        assert itinerary.item(i) == item
        assert itinerary.rows(i).tolist() == rows


@given(runs)
def test_a_run_resumes_at_the_next_item(run) -> None:  # type: ignore[no-untyped-def]
    itinerary, _ = run
    items = [itinerary.item(i) for i in range(len(itinerary))]
    for step in range(itinerary.total_steps + 1):
        trained = [i for i, item in enumerate(items) if item.training and item.step <= step]
        done = [i for i, item in enumerate(items) if item.step <= step]
        assert itinerary.after(step, False) == (trained[-1] + 1 if trained else 0)
        assert itinerary.after(step, True) == (done[-1] + 1 if done else 0)
    assert itinerary.after(itinerary.total_steps, True) == len(items)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch is 0: 1 or more"),
        ({"epochs": 0}, "epochs is 0: 1 or more"),
        ({"steps": 0}, "steps is 0: 1 or more"),
        ({"train_groups": [0]}, "train_groups holds no row: 1 or more"),
        ({"held_out": ("train", [1])}, "held_out is 'train': another split"),
    ],
)
def test_itinerary_refuses(change: dict[str, object], message: str) -> None:
    arguments = {"train_groups": [3], "held_out": None, "batch": 2, "seed": 0, "epochs": 1} | change
    with pytest.raises(ValueError, match=message):
        Itinerary(**arguments)  # type: ignore[arg-type]


def test_an_order_tells_row_groups_apart_that_hold_as_many_rows() -> None:
    orders = [Itinerary(sizes, None, batch=2, seed=0, epochs=1).order for sizes in ([3, 4], [4, 3])]
    assert orders[0] != orders[1]
    assert orders[0]["training images"] == orders[1]["training images"] == 7


def test_itinerary_has_no_item_or_step_beyond_its_last() -> None:
    itinerary = Itinerary([3], None, batch=2, seed=0, epochs=1)
    with pytest.raises(IndexError, match="item 2 of 2"):
        itinerary.item(2)
    with pytest.raises(ValueError, match="step is 3: 0 to 2"):
        itinerary.after(3, False)
