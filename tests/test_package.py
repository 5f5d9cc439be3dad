"""The package as a whole: what importing costs, what is public, what the demo does, doctests."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

import llmkit


def test_importing_loads_nothing_heavy() -> None:
    heavy = ["llama_cpp", "numpy", "pandas", "matplotlib", "ipywidgets", "tornado", "zmq", "jinja2", "pydantic", "jupyter_core", "psutil"]
    code = f"import sys, llmkit; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_public_names() -> None:
    assert set(llmkit.__all__) == set(dir(llmkit)) and "load" in llmkit.__all__
    for name in llmkit.__all__:
        assert getattr(llmkit, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        llmkit.nonsense  # noqa: B018


def test_errors_are_one_tree() -> None:
    from llmkit import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.LLMKitError)


def test_the_examples_in_docstrings_work() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules", "llmkit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


def test_serving_alone_drags_in_no_jupyter_server() -> None:
    code = "import sys, llmkit.gateway.standalone; print([m for m in ('jupyter_server', 'IPython', 'ipywidgets', 'llama_cpp', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.model
def test_the_demo() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "notebooks" / "demo.py")], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "That reply came from the model in the kernel" in done.stdout and "prefill_tok_s" in done.stdout
