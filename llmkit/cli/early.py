"""The command's first moments: what can begin before anything is imported.

A worker takes as long to import llama.cpp as the gateway its own modules: `llmkit serve MODEL`
starts one at once. Whatever the settings then say about it, `serve` takes or releases it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from llmkit.system import collecting
from llmkit.system.prepared import prepare

__all__ = ["WORKER", "main"]

# What `Child` runs for `llmkit.workers.engine`; a test compares them.
WORKER = (
    "import os; answers = os.dup(1); os.dup2(2, 1); "
    "from llmkit.bridge.child import main; main(answers, 'llmkit.workers.engine:run')"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `llmkit.cli.app`."""
    if argv is None:  # this process is the command's
        # Or pydantic looks for plugins in the metadata of every package that is installed.
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        if argv is None and _serves_a_model(sys.argv[1:]):
            collecting.pause()  # until the gateway runs
            prepare(WORKER)
        from llmkit.cli.app import main as run

        return run(argv)
    except KeyboardInterrupt:  # while modules are imported, too
        return 130


def _serves_a_model(given: Sequence[str]) -> bool:
    """Whether a worker will surely be wanted, as far as can be seen at a glance."""
    return (
        len(given) > 1
        and given[0] == "serve"
        and given[1][:1] not in ("-", "")
        and (given[1] != "echo" and "--help" not in given)
    )
