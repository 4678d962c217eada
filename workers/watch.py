"""An execution of Ray Data, seen and ended from outside."""

from __future__ import annotations

from typing import Any

from workers.room import settle


class Watch:
    """How many augmenters run now, as the execution under way knows it."""

    def __init__(self) -> None:
        self.executor: Any = None
        self.ended = False
        self.pooled = 0  # augmenters that are shared with other runs, if they are

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Ray Data sends its settings, and so the callback, to every task; the executor stays.
        return Watch, ()

    def callback(self) -> type:
        """A class that Ray Data makes an instance of, which tells us of the execution."""
        from ray.data._internal.execution.execution_callback import ExecutionCallback

        class Started(ExecutionCallback):
            def before_execution_starts(_, executor: Any) -> None:
                if self.ended:  # before there was an execution to end
                    raise RuntimeError("nobody wants this execution any more")
                self.executor = executor

        return Started

    def end(self) -> None:
        """Ends the execution, whatever it waits for, or keeps it from beginning."""
        self.ended = True
        if self.executor:
            self.executor.shutdown(force=True)

    def release(self) -> None:
        """Ends it, and returns once Ray's autoscaler is no longer asked for its nodes."""
        if self.executor:
            self.end()
            settle()

    @property
    def operators(self) -> list[Any]:
        """Ray Data's physical operators; none before the first execution."""
        return list(getattr(self.executor, "_topology", None) or ())

    @property
    def augmenters(self) -> int:
        """Augmenters that run."""
        return self.pooled or sum(op.get_actor_info().running for op in self.operators)
