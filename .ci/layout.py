"""What no linter checks: module sizes, docstrings, names that say nothing, and that nothing of the
machine is in the tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = {
    ".ci",
    ".dockerignore",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "benchmarks",
    "binder",
    "deploy",
    "docs",
    "jupyter_ext",
    "llmkit",
    "notebooks",
    "pyproject.toml",
    "tests",
}
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
MAX_LINES = 400
MACHINE = re.compile(r"(^|[^.\w])/(w[o]rk|r[o]ot|home)/[a-z]|https?://[^/\s]*pypi")


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    files = [f for f in listed if f and (ROOT / f).is_file()]
    faults = [
        f"{f}: {f.split('/')[0]} does not belong at the top level"
        for f in files
        if f.split("/")[0] not in TOP
    ]
    for name in files:
        text = (
            (ROOT / name).read_text(errors="replace") if not name.endswith((".png", ".ico")) else ""
        )
        faults += [
            f"{name}:{i}: a machine's path or host: {line.strip()[:80]}"
            for i, line in enumerate(text.splitlines(), 1)
            if MACHINE.search(line)
        ]
        if name.endswith(".py"):
            faults += python_faults(name, text)
    print("\n".join(faults) or f"layout: {len(files)} files, no fault")
    return bool(faults)


def python_faults(name: str, text: str) -> list[str]:
    faults = []
    if text.count("\n") > MAX_LINES:
        faults.append(f"{name}: {text.count(chr(10))} lines; {MAX_LINES} at most")
    if Path(name).stem in EMPTY_NAMES:
        faults.append(f"{name}: a name that says nothing")
    product = name.startswith(("llmkit/", "jupyter_ext/"))
    tree = ast.parse(text)
    if product and text and not ast.get_docstring(tree):
        faults.append(f"{name}: no module docstring")
    if (
        product
        and text
        and not any(
            isinstance(n, ast.Assign | ast.AnnAssign) and "__all__" in ast.unparse(n)
            for n in tree.body
        )
        and Path(name).stem != "__main__"
    ):
        faults.append(f"{name}: no __all__")
    return faults


if __name__ == "__main__":
    sys.exit(main())
