"""Garbage collection around the start of a process."""

import json
import subprocess
import sys

CODE = """
import gc, json
from llmkit.system import collecting

class Node:
    pass

def cycle():
    node = Node()
    node.itself = node

collecting.pause()
for _ in range(10_000):
    cycle()
paused = sum(isinstance(each, Node) for each in gc.get_objects())
imported = len(gc.get_objects()) - paused
collecting.resume()
known = gc.get_freeze_count()
for _ in range(10_000):
    cycle()
rest = len(gc.get_objects())
kept = Node()
collecting.settle()
known = gc.get_freeze_count() - known
print(json.dumps([paused, imported, gc.get_freeze_count() - known, gc.isenabled(), rest, known]))
"""


def test_what_a_process_starts_with_is_not_looked_at_again() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True, timeout=60)
    paused, imported, known, is_enabled, rest, later = json.loads(done.stdout)
    assert paused == 10_000  # nothing was collected
    assert known > imported > 0  # with what was imported
    assert is_enabled and rest < 10_000  # but later garbage is
    assert 0 < later < 10_000  # what is kept, without the garbage
