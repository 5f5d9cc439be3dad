"""Other people's clients, unchanged, against a live server on the embedded model; each in an
environment of its own (`.ci/clients`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import wait_for
from test_cli import Served

import llmkit

HERE = Path(__file__).parent / "clients"
ENVIRONMENTS = Path(sys.prefix) / "clients"
pytestmark = pytest.mark.model
FACTS = [
    ("The capital of France is", ["Paris", "Berlin", "Madrid"], 0),
    ("Water freezes at zero degrees", ["Fahrenheit", "Celsius", "Newton"], 1),
    ("A week has", ["five days", "ten days", "seven days"], 2),
    ("The sun rises in the", ["west", "east", "cellar"], 1),
]
TASK = """
task: facts
dataset_path: json
dataset_kwargs: {data_files: %s}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str]]:
    servers = [
        Served(model, "--port", "0", "--n-ctx", "1024", "--n-slots", "4", LLMKIT_API_KEY="k")
        for model in ("smollm2", "minilm")
    ]
    try:
        for server in servers:
            wait_for(lambda: server.health() == 200, 60)  # noqa: B023
        yield servers[0].url, servers[1].url
    finally:
        for server in servers:
            server.stop()


def run(environment: str, *command: str | Path, cwd: Path, **variables: str) -> str:
    """What a client prints; skips loudly where its environment is missing, but never in CI."""
    folder = ENVIRONMENTS / environment / "bin"
    if not folder.exists():
        if os.environ.get("CI"):
            pytest.fail(f"{folder} is missing, and CI may not skip")
        pytest.skip("the clients' environments are missing: bash .ci/clients")
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(cwd / "hf"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    env = {**os.environ, **offline, "OPENAI_API_KEY": "k", "NO_COLOR": "1", **variables}
    done = subprocess.run(
        [folder / command[0], *command[1:]],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.mark.parametrize(
    ("environment", "client"),
    [
        ("openai2", "litellm"),
        ("openai2", "llama_index"),
        ("openai2", "instructor"),
        ("openai3", "langchain"),
        ("openai3", "llm"),
    ],
)
def test_a_client_works_unchanged(
    environment: str, client: str, urls: tuple[str, str], tmp_path: Path
) -> None:
    assert "Traceback" not in run(
        environment, "python", HERE / f"with_{client}.py", *urls, cwd=tmp_path
    )  # the client's script asserts the rest


def test_lm_evaluation_harness_gets_the_numbers_of_the_model(
    urls: tuple[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "facts.jsonl"
    data.write_text(
        "".join(json.dumps({"question": q, "choices": c, "answer": a}) + "\n" for q, c, a in FACTS)
    )
    (tmp_path / "facts.yaml").write_text(TASK % data)
    printed = run("openai3", "python", HERE / "lm_eval_task.py", urls[0], tmp_path, cwd=tmp_path)
    found = json.loads(printed.splitlines()[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JUPYTER_RUNTIME_DIR", raising=False)
        llm = llmkit.load("smollm2", n_ctx=1024, n_slots=4, share=False)
    num_right = 0
    for (question, choices, answer), scores in zip(FACTS, found["samples"], strict=True):
        begin = len(llm.tokenize(question))
        done = llm.generate(
            [f"{question} {choice}" for choice in choices], max_tokens=0, prompt_logprobs=0
        )
        own = [sum(entry.logprob or 0.0 for entry in c.prompt_logprobs[begin:]) for c in done]
        assert [score for score, _ in scores] == pytest.approx(own, abs=0.02), (
            "batches differ in shape, no more"
        )
        num_right += own.index(max(own)) == answer
    llm.unload()
    assert found["acc"] == num_right / len(FACTS) > 0


def test_no_request_that_the_schemas_describe_is_a_server_error(tmp_path: Path) -> None:
    server = Served(
        "smollm2",
        "--port",
        "0",
        "--n-ctx",
        "256",
        "--n-slots",
        "16",
        "--log-level",
        "warning",
        LLMKIT_API_KEY="k",
    )
    schema = server.url.removesuffix("/v1") + "/openapi.json"
    options = [
        "-H",
        "Authorization: Bearer k",
        "-c",
        "not_a_server_error",
        "--phases",
        "coverage,fuzzing",
        "--max-examples",
        "4",
        "--request-timeout",
        "30",
        "-w",
        "8",
        "--no-color",
    ]
    try:
        wait_for(lambda: server.health() == 200, 60)
        printed = run(
            "openai3",
            "st",
            "run",
            schema,
            *options,
            cwd=tmp_path,
            SCHEMATHESIS_HOOKS=str(HERE / "schemathesis_hooks.py"),
        )
        assert (
            re.search(r"Selected: (\d+)/\1\b", printed)
            and "server error" not in printed.lower()
            and server.health() == 200
        )
    finally:
        server.stop()
