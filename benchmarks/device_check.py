"""`make device-check`: what only a GPU can show, in at most ten minutes and without a network.

``pack`` collects, on a machine with a network, what the GPU machine lacks: llama.cpp's sources (of
the pinned llama-cpp-python, trimmed), wheels, and a vocabulary. ``run`` builds them with CUDA for
the GPU that is there and prints one row of a table a check. Every check runs in its own process, so
one that fails stops no other. ``run --dry-run`` does what a CPU can, with the installed packages.

Only the standard library is imported here: the checks' processes import llmkit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from device_build import build, make_model
from device_checks import auto, hold, monitor, release, speed, stop, vram
from device_pack import pack
from device_words import (
    ROOT,
    Row,
    Skipped,
    row,
    skipped,
    smi,
)

FOLDER = ROOT / ".cache" / "device"  # git ignores it; a device run carries it


PARTS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "build": build,
    "model": make_model,
    "vram": vram,
    "auto": auto,
    "release": release,
    "stop": stop,
    "monitor": monitor,
    "speed": speed,
}


def part(name: str) -> int:
    """Run one part: its options come from standard input, its rows go to standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        for line in PARTS[name](json.loads(sys.stdin.read())):
            print(json.dumps(line), file=answers, flush=True)
    except Skipped as why:
        print(json.dumps(skipped(name, "", str(why))), file=answers, flush=True)
    except BaseException as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps(row(name, "it runs", text, False)), file=answers, flush=True)
        return 1
    return 0


class Table:
    """The rows, printed as they come and kept as JSON lines."""

    def __init__(self, out: Path | None, deadline: float) -> None:
        self.out, self.deadline, self.failed = out, deadline, 0
        print("| check | expected | measured | verdict | s |\n|---|---|---|---|---|", flush=True)

    def add(self, name: str, line: Row, seconds: float) -> None:
        ok = line["ok"]
        verdict = (
            "skipped" if line.get("skipped") else {None: "reported", True: "ok"}.get(ok, "FAILED")
        )
        self.failed += ok is False
        cells = [line["what"], line["expected"], line["measured"], verdict, f"{seconds:.1f}"]
        print("| " + " | ".join(c.replace("|", "/").strip() for c in cells) + " |", flush=True)
        if self.out is not None:
            with self.out.open("a") as out:
                record = {"part": name, **line, "verdict": verdict, "seconds": round(seconds, 2)}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")

    def run(
        self, name: str, options: dict[str, Any], environment: dict[str, str], most: float
    ) -> bool:
        """Run a part in a process of its own; whether all of it went well."""
        limit = min(most, self.deadline - time.monotonic())
        if limit < 5:
            self.add(name, skipped(name, "", "no time left (--budget)"), 0.0)
            return False
        failed_before, begin = self.failed, time.monotonic()
        errors = Path(options["work"]) / f"{name}.err"
        with errors.open("ab") as words:
            command = [sys.executable, __file__, "part", name]
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                env=environment,
                text=True,
                start_new_session=True,
            )
        killer = threading.Timer(limit, kill_group, [child.pid])
        killer.start()
        rows = 0
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(options))
        child.stdin.close()
        for text in child.stdout:
            now = time.monotonic()
            self.add(name, json.loads(text), now - begin)
            begin, rows = now, rows + 1
        status = child.wait()
        killer.cancel()
        if status and (status != 1 or not rows):
            why = f"ended with status {status} (limit {limit:.0f} s); see {errors}"
            self.add(name, row(name, "it runs", why, False), time.monotonic() - begin)
        return self.failed == failed_before


def kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def lacking(sources: Path) -> list[str]:
    """What a run with a GPU needs and is not here."""
    found = {"a GPU (nvidia-smi answers)": smi("name") is not None}
    found |= {f"{tool} on the PATH": shutil.which(tool) is not None for tool in ("nvcc", "cmake")}
    packed = any(sources.glob("llama_cpp_python-*.tar.gz")) or (sources / "vendor").is_dir()
    found[f"packed sources in {sources} (device_check.py pack)"] = packed
    return [what for what, here in found.items() if not here]


def run(args: argparse.Namespace) -> int:
    """All parts; 0 if none failed, 1 otherwise, 2 if this is no machine for it."""
    if not args.dry_run and (missing := lacking(args.sources)):
        print("This machine lacks " + "; ".join(missing) + ".", file=sys.stderr)
        print(
            "On a machine with a network: python benchmarks/device_check.py pack\n"
            f"Carry {args.sources} along, then on the GPU machine: make device-check\n"
            'What a CPU can check: make device-check DEVICE_ARGS="--dry-run"',
            file=sys.stderr,
        )
        return 2
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    card = smi("name,compute_cap,driver_version,memory.total")
    table_head = f"{card[0]}, driver {card[2]}, {card[3]} MiB" if card else "no GPU"
    print(f"{table_head}; {platform.processor() or platform.machine()}, {os.cpu_count()} cores\n")
    table = Table(args.out, time.monotonic() + args.budget)
    common = {"work": str(work), "sources": str(args.sources.resolve())}
    environment, site = dict(os.environ), work / "site"
    search = [str(ROOT)]

    def wanted(name: str) -> bool:
        return not args.only or name in args.only

    if wanted("build"):
        arch = card[1].replace(".", "") if card else "90" if shutil.which("nvcc") else None
        table.run(
            "build",
            {**common, "arch": arch, "compile": not args.dry_run},
            environment,
            args.build_limit if not args.dry_run else 60,
        )
    if not args.dry_run:
        search.insert(0, str(site))
        if not site.is_dir():
            print("\nNothing was built, so nothing else can be checked.")
            return 1
    search += [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    environment["PYTHONPATH"] = os.pathsep.join(search)
    model = args.model or ("smollm2" if args.dry_run else str(work / "made-1b-q8_0.gguf"))
    if not args.model and not args.dry_run and not Path(model).exists() and wanted("model"):
        table.run("model", {**common, "target": model}, environment, 90)
    common["model"] = model
    small = {"n_ctx": 512, "n_slots": 2} if args.dry_run else {"n_ctx": 4096, "n_slots": 8}
    settings = [small, {"n_ctx": 8192, "n_slots": 32, "kv_type": "q8_0"}]
    if wanted("vram"):
        for setting in settings:
            table.run("vram", {**common, "setting": setting}, environment, 60)
    for name in ("auto", "release", "monitor"):
        if wanted(name):
            table.run(name, {**common, **small}, environment, 90)
    if wanted("stop"):
        sizes = {"n_ctx": 4096, "words": 3000, "times": 2, "after_s": 0.5}
        if not args.dry_run:
            sizes = {"n_ctx": 65536, "words": 48_000, "times": 3, "after_s": 0.15}
        table.run("stop", {**common, **sizes}, environment, 60)
    if wanted("speed"):
        table.run("speed", {**common, **speed_options(args, work, model)}, environment, 240)
    print(f"\n{table.failed} failed." if table.failed else "\nNothing failed.")
    return int(table.failed > 0)


def speed_options(args: argparse.Namespace, work: Path, model: str) -> dict[str, Any]:
    built = work / "build" / "bin" / "llama-server"
    server = os.environ.get("LLAMA_SERVER") or (str(built) if built.exists() else None)
    if model == "smollm2":
        cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmkit"
        ready = sorted(cached.glob("peer-*/build/bin/llama-server"))
        server = server or (str(ready[-1]) if ready else None)
        sys.path.insert(0, str(ROOT))
        from llmkit.models.registry import resolve

        path = str(resolve(model).path)
    else:
        path = model
    sizes = {"clients": [1, 8, 32], "turns": 3, "n_ctx": 512, "n_slots": 32}
    sizes |= {"prompt_words": 256, "max_tokens": 128}
    if args.dry_run:
        sizes |= {"clients": [1, 2], "turns": 1, "n_slots": 2, "prompt_words": 32, "max_tokens": 16}
    why = "not built here (dry run; $LLAMA_SERVER names one)" if args.dry_run else "not built"
    return {
        "server": server,
        "no_server": why,
        "path": path,
        "threads": len(os.sched_getaffinity(0)),
        **sizes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="collect what a GPU machine without network needs")
    packing.add_argument("--sdist", type=Path, help="an sdist at hand, instead of pip download")
    packing.add_argument("--python", default="3.12", help="the GPU machine's Python")
    packing.add_argument("--model", default="smollm2", help="whose vocabulary to carry")
    running = commands.add_parser("run", help="build and check")
    running.add_argument("--dry-run", action="store_true", help="what a CPU can, in 3 minutes")
    running.add_argument("--only", nargs="+", choices=list(PARTS), help="only these parts")
    running.add_argument("--model", help="a model file (default: one is made on the machine)")
    running.add_argument("--out", type=Path, help="append every row as a line of JSON")
    running.add_argument("--work", type=Path, default=FOLDER.with_name("device-work"))
    running.add_argument("--budget", type=float, default=570, help="seconds for all parts")
    running.add_argument("--build-limit", type=float, default=400, help="seconds to compile")
    for command in (packing, running):
        command.add_argument("--sources", type=Path, default=FOLDER, help="what pack collected")
    commands.add_parser("part").add_argument("name", choices=list(PARTS))
    commands.add_parser("hold").add_argument("size", type=int)
    args = parser.parse_args()
    if args.command == "part":
        return part(args.name)
    if args.command == "hold":
        return hold(args.size)
    return pack(args) if args.command == "pack" else run(args)


if __name__ == "__main__":
    sys.exit(main())
