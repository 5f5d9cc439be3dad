"""lm-evaluation-harness on a small local task through `local-completions`, with the server's own
tokenizer. Prints accuracy and log-likelihoods as JSON."""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

URL, FOLDER = sys.argv[1:3]
arguments = {
    "model": "smollm2",
    "base_url": f"{URL}/completions",
    "num_concurrent": 2,
    "batch_size": 4,
    "max_length": 512,
    "max_retries": 1,
    "tokenizer_backend": "remote",
    "tokenized_requests": True,
    "auth_token": "k",
}
found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args=arguments,
    tasks=["facts"],
    task_manager=TaskManager(include_path=FOLDER, include_defaults=False),
    log_samples=True,
    bootstrap_iters=0,
)
samples = [
    [[float(value), bool(greedy)] for ((value, greedy),) in s["resps"]]
    for s in found["samples"]["facts"]
]
print(json.dumps({"acc": found["results"]["facts"]["acc,none"], "samples": samples}))
