"""simonw/llm, as its users configure it: extra-openai-models.yaml, the command line, a schema, a
conversation."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL = sys.argv[1]
COMMAND = Path(sys.executable).with_name("llm")
CONFIG = f"""
- model_id: here
  model_name: smollm2
  api_base: {URL}
  api_key_name: here
  supports_schema: true
  supports_tools: true
"""

with tempfile.TemporaryDirectory() as home:
    (Path(home) / "extra-openai-models.yaml").write_text(CONFIG)
    environment = {**os.environ, "LLM_USER_PATH": home}

    def llm(*args: str) -> str:
        done = subprocess.run(
            [COMMAND, *args], env=environment, text=True, capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    llm("keys", "set", "here", "--value", "k")
    assert llm(
        "-m", "here", "-o", "temperature", "0", "-o", "max_tokens", "20", "Name one colour."
    ).strip()
    assert llm("-m", "here", "-o", "max_tokens", "20", "--no-stream", "Name one colour.").strip()
    assert llm("-m", "here", "-c", "-o", "max_tokens", "20", "Another one.").strip()
    shaped = llm(
        "-m",
        "here",
        "-o",
        "temperature",
        "0",
        "-o",
        "max_tokens",
        "60",
        "--schema",
        "age int",
        "Anna is 31.",
    )
    assert '"age"' in shaped, shaped
