"""benchmarks/fleet.py in small: the same seed gives the same, nothing is lost, and the order of the
policies."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
from conftest import ROOT

TIMES = ("choice_us", "choice_p99_us")


@pytest.fixture(scope="module")
def fleet() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import fleet
    finally:
        sys.path.pop(0)
    return fleet


def run(fleet: Any, scenario: Any, policy: str = "cost", seed: int = 1) -> dict[str, Any]:
    simulation = fleet.Simulation(scenario, policy, seed)
    simulation.run()
    found: dict[str, Any] = fleet.figures_of(simulation)
    return {k: v for k, v in found.items() if k not in TIMES}


def test_every_scenario_is_conserved_and_seeded(fleet: Any) -> None:
    for scenario in fleet.SCENARIOS:
        small = replace(fleet.quick(scenario), measured_s=8.0)
        found = run(fleet, small)
        assert found == run(fleet, small), scenario.name
        assert found != run(fleet, small, seed=2)
        assert found["lost"] == found["wrong"] == 0 < found["requests"], scenario.name
        if scenario.kills_per_min or scenario.drains:
            assert found["moves"] or found["tokens_again"] >= 0


def test_the_order_of_the_policies(fleet: Any) -> None:
    [plain] = [s for s in fleet.SCENARIOS if s.name == "plain-8"]
    small = replace(fleet.quick(plain), replicas=60, gateways=4)
    cost, bounded, two = (run(fleet, small, p) for p in ("cost", "bounded", "two"))
    assert cost["hit_rate"] > bounded["hit_rate"] > two["hit_rate"]
    assert cost["ttft_p99"] < 0.6 * bounded["ttft_p99"]
    assert cost["ttft_p50"] < bounded["ttft_p50"] < two["ttft_p50"]


def test_conversations_are_found_whichever_gateway_they_come_to(fleet: Any) -> None:
    [scattered] = [s for s in fleet.SCENARIOS if s.name == "scattered-8"]
    small = replace(fleet.quick(scattered), replicas=60, gateways=8)
    cost, bounded = (run(fleet, small, p) for p in ("cost", "bounded"))
    assert cost["hit_rate"] > 0.8 > bounded["hit_rate"]
    assert cost["ttft_p99"] < 0.6 * bounded["ttft_p99"]
    assert cost["ttft_p50"] < 0.6 * bounded["ttft_p50"]


def test_a_noisy_user_takes_nothing_from_others(fleet: Any) -> None:
    [noisy] = [s for s in fleet.SCENARIOS if s.name == "noisy-user"]
    assert run(fleet, fleet.quick(noisy))["jain"] >= 0.95
