"""Fixtures of tests with a fleet; a module has them by `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient
from fleet_parts import GATEWAY

from llmkit.cluster.fleet import Fleet


@pytest.fixture
def slow() -> Iterator[FakeClient]:
    """An engine that takes its time."""
    client = FakeClient("fleeting", FakeRunner(n_ctx=200_000, step_s=0.002))
    yield client
    client.close()


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    """Takes what is to be done after a test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def fleet(ending: ExitStack) -> Fleet:
    """The gateway's side, on a free port."""
    fleet = Fleet("tcp://127.0.0.1:0", GATEWAY)
    ending.callback(fleet.close)
    return fleet
