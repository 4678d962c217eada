"""Spans are kept only when asked for, and the idle share is what they leave."""

from __future__ import annotations

from pipeline.tracing import Span, Trace, chrome, idle_fraction


def test_nothing_is_kept_unless_it_is_on() -> None:
    trace = Trace()
    with trace.span("forward", "0"):
        pass
    assert trace.spans == []
    trace.on, trace.step = True, 3
    with trace.span("forward", "0"):
        pass
    assert [(s.kind, s.name, s.step) for s in trace.spans] == [("forward", "0", 3)]
    assert trace.spans[0].seconds >= 0


def test_the_idle_share_is_the_bubble() -> None:
    # Two stages, two micro-batches, forward and backward of a second each: (S-1)/(M+S-1) = 1/3.
    first = [("forward", 0), ("forward", 1), ("backward", 3), ("backward", 5)]
    last = [("forward", 1), ("backward", 2), ("forward", 3), ("backward", 4)]
    ranks = [[Span(kind, "", at, 1.0, 7) for kind, at in acts] for acts in (first, last)]
    ranks[0].append(Span("wait", "", 0, 100, 7))
    ranks[1].append(Span("forward", "", 50, 1, 8))
    assert abs(idle_fraction(ranks, 7) - 1 / 3) < 1e-9


def test_chrome_has_a_process_a_rank() -> None:
    spans = [[Span("forward", "0", 1.0, 0.5, 2)], [Span("wait", "conv3", 2.0, 0.25, 2)]]
    events = chrome(spans, ["a", "b"])["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    assert [(e["pid"], e["name"], e["ts"], e["dur"]) for e in complete] == [
        (0, "forward 0", 1e6, 5e5),
        (1, "wait conv3", 2e6, 2.5e5),
    ]
    names = [e["args"]["name"] for e in events if e.get("name") == "process_name"]
    assert names == ["a", "b"]
