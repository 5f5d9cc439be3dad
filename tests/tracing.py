"""A debugger, as far as it holds a process: gdb, gcore and CRIU do the same."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

# Its own process: what a tracer is told of a process by waitpid would confuse the parent.
TRACER = """
import ctypes, sys
ptrace, (pid,) = ctypes.CDLL(None, use_errno=True).ptrace, map(int, sys.argv[1:])
ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
ATTACH, DETACH = 16, 17
if ptrace(ATTACH, pid, None, None):
    sys.exit(f"errno {ctypes.get_errno()}")
__import__("os").waitpid(pid, 0)
print("held", flush=True)
sys.stdin.read()
ptrace(DETACH, pid, None, None)
"""


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    """Hold a process in a tracing stop; afterwards it goes on."""
    if sys.platform != "linux":
        pytest.skip("only Linux tells a tracing stop from another")
    command = [sys.executable, "-c", TRACER, str(pid)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stdout is not None and tracer.stdin is not None and tracer.stderr is not None
        if tracer.stdout.readline() != "held\n":
            pytest.skip(f"processes cannot be traced here: {tracer.stderr.read().strip()}")
        try:
            yield
        finally:
            tracer.stdin.close()
            tracer.wait(30)
