"""Fake engines that stop where a test wants them to, so that nothing depends on who is faster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fakes import wait_for

from llmkit.engine.batch import Batch, StepOutput

FOREVER = 600.0


def hold(members: Iterable[Any], steps: int) -> None:
    """Let each `FakeClient` compute so many steps more, and stay in the next one until its requests
    are aborted or it is let go."""
    for member in members:
        runner = member.runner
        runner.step_s = runner.pace = getattr(runner, "pace", runner.step_s)

        def execute(
            batch: Batch, runner: Any = runner, last: int = len(runner.batches) + steps
        ) -> StepOutput:
            runner.step_s = FOREVER if len(runner.batches) >= last else runner.pace
            found: StepOutput = type(runner).execute(runner, batch)
            return found

        runner.execute = execute


def stuck(members: Sequence[Any]) -> Any:
    """The one that is held in a step, of those that are not gone."""
    found: list[Any] = []

    def look() -> bool:
        found[:] = [m for m in members if m.runner.step_s == FOREVER and not m.state.is_gone]
        return bool(found)

    wait_for(look)
    return found[0]


def let_go(members: Iterable[Any]) -> None:
    """They compute at their own pace again."""
    for member in members:
        runner = member.runner
        vars(runner).pop("execute", None)
        was_stuck, runner.step_s = runner.step_s == FOREVER, getattr(runner, "pace", runner.step_s)
        if was_stuck:
            runner.interrupt()


def end_stuck(members: Sequence[Any], **how: bool) -> None:
    """The replica that is held ends there, and the others go on at their own pace."""
    one = stuck(members)
    let_go(m for m in members if m is not one)
    one.end(**how)
