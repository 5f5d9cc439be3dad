"""The engine alone, in this process, under the workload of `llmkit bench`.

Reads one JSON job per line from stdin and prints its figures as JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from typing import Any

from llmkit.bench.prompts import prompt_text
from llmkit.bench.workload import percentile
from llmkit.errors import LLMKitError
from llmkit.protocol import GenerationRequest, SamplingParams
from llmkit.runtime.local import LocalEngine


def run(engine: LocalEngine, job: dict[str, int]) -> dict[str, Any]:
    params = SamplingParams(max_tokens=job["max_tokens"], temperature=0, ignore_eos=True)
    todo, lock = iter(range(job["requests"])), threading.Lock()
    ttft: list[float] = []
    gaps: list[float] = []
    errors: list[str] = []
    before, begin = engine.stats(), time.perf_counter()

    def client() -> None:
        while True:
            with lock:
                index = next(todo, None)
            if index is None:
                return
            start = time.perf_counter()
            request = GenerationRequest(
                f"bench-{job['seed']}-{index}",
                params,
                prompt=prompt_text(job["seed"], index, job["prompt_words"]),
            )
            try:
                times = [time.perf_counter() for _ in engine.submit(request)]
            except LLMKitError as error:
                errors.append(str(error))
                continue
            ttft.append(1000 * (times[0] - start))
            gaps.extend(1000 * (b - a) for a, b in itertools.pairwise(times))

    threads = [threading.Thread(target=client) for _ in range(job["concurrency"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall, after = time.perf_counter() - begin, engine.stats()
    step = after.step_seconds_total - before.step_seconds_total
    return {
        "tok_s": len(ttft) * job["max_tokens"] / wall,
        "ttft_p50_ms": percentile(ttft, 0.5),
        "ttft_p95_ms": percentile(ttft, 0.95),
        "itl_p50_ms": percentile(gaps, 0.5),
        "itl_p95_ms": percentile(gaps, 0.95),
        "itl_max_ms": max(gaps, default=float("nan")),
        "python_share": 1 - (after.backend_seconds_total - before.backend_seconds_total) / step,
        "errors": len(errors),
    }


def main() -> None:
    options = json.loads(sys.argv[1])
    engine = LocalEngine(**options)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(engine, json.loads(line))), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
