"""`llmkit doctor`: machines as they are described, and what it says of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from doctor_run import levels, only, run
from terminal import terminal

from llmkit.cli import doctor, machine, main, surroundings
from llmkit.cli.findings import Finding, as_json, shown
from llmkit.cli.machine import Llama
from llmkit.models.memory import free_ram
from llmkit.system import resources
from llmkit.system.accelerators import Accelerator

GIB = 1 << 30


# The whole


def test_everything_is_looked_at() -> None:
    done = run("--json")
    assert done.returncode == 0 and not done.stderr, done
    said = json.loads(done.stdout)
    topics = [finding["topic"] for finding in said["findings"]]
    for topic in (
        "versions", "system", "processor", "memory", "GPU", "llama.cpp", "settings",
        "runtime folder", "running models", "Jupyter extension", "Jupyter server", "open files",
        "locked memory", "disk: cache", "disk: downloads", "disk: temporary files", "port 3000",
    ):  # fmt: skip
        assert any(t.startswith(topic) for t in topics), topic
    assert said["ok"] and all(f["level"] in ("ok", "warn", "none") for f in said["findings"])
    for finding in said["findings"]:
        assert finding["advice"] or finding["level"] != "warn", finding


def test_something_bad_is_exit_1() -> None:
    done = run(LLMKIT_APIKEY="x")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    assert "settings" in line and "LLMKIT_APIKEY" in line
    assert "Did you mean LLMKIT_API_KEY" in " ".join(done.stdout.split())
    assert "see above" in done.stderr
    assert "\x1b" not in done.stdout


def test_at_a_terminal() -> None:
    with terminal("doctor", columns=50) as colored:
        assert colored.ended(120) == 0 and "\x1b[32mok" in colored.text
    with terminal("doctor", columns=50, NO_COLOR="1") as plain:
        assert plain.ended(120) == 0 and "\x1b" not in plain.text


def test_it_works_without_llama_cpp(tmp_path: Path) -> None:
    """And without everything else that a gateway does not need."""
    stub = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)"
    for name in ("llama_cpp", "numpy", "llguidance", "pandas", "jupyter_server"):
        (tmp_path / f"{name}.py").write_text(stub)
    done = run("--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done
    found = {f["topic"]: f for f in json.loads(done.stdout)["findings"]}
    assert found["llama.cpp"]["level"] == "warn"
    assert "not installed" in found["llama.cpp"]["text"]
    assert "pip install llama-cpp-python" in found["llama.cpp"]["advice"]


def test_a_check_that_fails_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("the moon is full")

    monkeypatch.setattr(machine, "ask_llama", Llama)
    monkeypatch.setattr(machine, "memory", broken)
    found = list(doctor.findings())
    (failed,) = [f for f in found if f.topic == "memory"]
    assert failed.level == "warn" and "the moon is full" in failed.text
    assert found[-1].topic.startswith("port")
    assert main(["doctor", "--json"]) == 0 and "the moon" in capsys.readouterr().out


# The machine


def cpuinfo(root: Path, flags: str, model: str = "A CPU") -> Path:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    text = f"processor\t: 0\nmodel name\t: {model}\nflags\t\t: {flags}\n"
    (root / "proc/cpuinfo").write_text(text)
    return root


def test_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    old = only(machine.processor(cpuinfo(tmp_path, "fpu sse2 avx")))
    assert old.level == "warn" and "AVX2" in old.advice and "A CPU: 4 of" in old.text
    new = only(machine.processor(cpuinfo(tmp_path, "fpu avx avx2 avx512f fma")))
    assert new.level == "ok" and new.text.endswith("AVX, AVX2, FMA, AVX512")
    (tmp_path / "proc/cpuinfo").unlink()
    assert only(machine.processor(tmp_path)).level == "ok"  # the system does not say


def group(root: Path, line: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(line)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


V2_SERVICE = {
    "system.slice/llmkit.service/cpu.max": "max 100000\n",
    "system.slice/llmkit.service/memory.max": "max\n",
    "system.slice/cpu.max": "200000 100000\n",
    "system.slice/memory.max": str(4 * GIB),
    "system.slice/memory.current": str(3 * GIB),
    "system.slice/memory.stat": (f"anon 5\ninactive_file {GIB // 2}\nactive_file {GIB // 2}\n"),
}
V1 = {
    "cpu/docker/abc/cpu.cfs_quota_us": "150000",
    "cpu/docker/abc/cpu.cfs_period_us": "100000",
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "memory/docker/abc/memory.limit_in_bytes": str(2 * GIB),
    "memory/docker/abc/memory.usage_in_bytes": str(GIB),
    "memory/docker/abc/memory.stat": "cache 1\ntotal_inactive_file 0\n",
}


@pytest.mark.parametrize(
    "line, files, cores, free",
    [
        ("0::/system.slice/llmkit.service\n", V2_SERVICE, 2, 2 * GIB),
        ("3:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n", V1, 1, GIB),
        # A container: the path is the host's, the files are at the root.
        ("0::/../../x\n", {"cpu.max": "300000 100000", "memory.max": "0"}, 3, None),
        ("0::/\n", {"cpu.max": "nonsense", "memory.max": "nonsense"}, 8, None),
        ("nonsense\n", {}, 8, None),
        ("0::/\n", {"cpu.max": "1000 100000"}, 1, None),
        ("0::/\n", {"cpu.max": "-1 100000"}, 8, None),
    ],
)
def test_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, files: dict[str, str], cores: int,
    free: int | None,
) -> None:  # fmt: skip
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    if line == "nonsense\n":
        line = "0\n"
    root = group(tmp_path, line, files) if ":" in line else tmp_path
    assert resources.usable_cores(root) == cores
    limit = resources.group_memory(root)
    assert (limit.free if limit else None) == free


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, level in ((100 << 20, "bad"), (GIB, "warn"), (8 * GIB, "ok")):
        monkeypatch.setattr("llmkit.models.memory.free_ram", lambda free=free: free)
        assert only(machine.memory(tmp_path)).level == level
    monkeypatch.setenv("MEM_LIMIT", "1000000000")
    assert "MEM_LIMIT=1000000000" in only(machine.memory(tmp_path)).text
    assert free_ram() > 0


def test_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    known = Llama(
        "1", ["CUDA", "CPU"],
        [("CUDA0", "NVIDIA L4", 20 * GIB, 24 * GIB), ("CUDA1", "NVIDIA L4", GIB, 24 * GIB)],
    )  # fmt: skip
    visible, first, second = machine.gpus(known, tmp_path)
    assert (visible.topic, visible.text) == ("CUDA_VISIBLE_DEVICES", "0,1")
    assert (first.topic, first.level) == ("GPU CUDA0", "ok") and "20.0 of 24.0 GiB" in first.text
    assert (second.topic, second.level) == ("GPU CUDA1", "warn") and "nvidia-smi" in second.advice
    monkeypatch.setattr(machine, "accelerators", lambda _: [Accelerator("nvidia", "NVIDIA L4")])
    assert only(machine.llama(known)).level == "ok"
    unused = Llama("1", ["CPU"])
    assert "NVIDIA L4; not used" in only(machine.gpus(unused), "GPU").text
    better = only(machine.llama(unused))
    assert better.level == "warn" and "make cuda" in better.advice


def test_a_build_that_leaves_something_out(tmp_path: Path) -> None:
    root = cpuinfo(tmp_path, "avx avx2 fma f16c avx512f avx512_vnni")
    whole = {"AVX", "AVX2", "FMA", "F16C"}
    found = only(machine.llama(Llama("1", ["CPU"], [], whole), root))
    assert found.level == "warn" and "AVX512, AVX512_VNNI" in found.advice
    found = only(machine.llama(Llama("1", ["CPU"], [], whole | {"AVX512", "AVX512_VNNI"}), root))
    assert found.level == "ok" and "nothing faster" in found.text
    assert only(machine.llama(Llama("1", ["CPU"], [], set()), root)).level == "ok"
    on_gpu = Llama("1", ["CUDA", "CPU"], [("CUDA0", "x", 9, 10)], whole)
    assert only(machine.llama(on_gpu, root)).level == "ok"


@pytest.mark.parametrize(
    "code, words",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL (built for another"),
        ("import os; os.abort()", "SIGABRT"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("print('nonsense')", "it said nothing"),
        ("print('[]')", "loading it fails"),
        ("import time; time.sleep(60)", "does not answer"),
        ("import sys; sys.stderr.write('\\x1b[31mboo'); sys.exit(3)", "boo"),
    ],
)
def test_a_llama_cpp_that_does_not_work(
    monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    monkeypatch.setattr(machine, "ASK", code)
    monkeypatch.setattr(machine, "PATIENCE_S", 2.0 if "sleep" in code else 30.0)
    known = machine.ask_llama()
    assert words in known.fault and not known.missing
    found = only(machine.llama(known))
    assert found.level == "bad" and "make cpu" in found.advice


def test_this_llama_cpp_answers() -> None:
    known = machine.ask_llama()
    assert known.version and "CPU" in known.backends and not known.fault and not known.gpus


def test_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {"files": (256, 512), "processes": (100, 100), "locked": (None, None)}
    monkeypatch.setattr(resources, "limits", lambda: known)
    found = list(machine.open_limits(tmp_path))
    assert only(found, "open files").level == "warn" and "65536" in only(found, "open").advice
    assert only(found, "processes").level == "warn"
    assert "no limit" in only(found, "locked").text
    known |= {"files": (1024, None), "processes": (None, None)}
    assert levels(machine.open_limits(tmp_path)) == ["ok", "ok"]


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there" / "yet"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for free, level in ((100 << 20, "bad"), (GIB, "warn"), (99 * GIB, "ok")):
        monkeypatch.setattr(resources, "free_disk", lambda path, free=free: (tmp_path, free))
        assert levels(machine.disks()) == [level] * 3
    assert str(tmp_path / "not/there/yet/hub") in only(machine.disks(), "downloads").text
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(tmp_path / "older"))
    assert str(tmp_path / "older") in only(machine.disks(), "downloads").text
    monkeypatch.undo()
    assert resources.free_disk(tmp_path / "a" / "b")[0] == tmp_path


def test_the_models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(surroundings.models_dir())
    monkeypatch.setenv("LLMKIT_MODELS_DIR", str(tmp_path))
    found = only(surroundings.models_dir())
    assert found.level == "ok" and str(tmp_path) in found.text
    monkeypatch.setenv("LLMKIT_MODELS_DIR", str(tmp_path / "none"))
    found = only(surroundings.models_dir())
    assert found.level == "bad" and "does not exist" in found.text and found.advice


# How it looks


@pytest.mark.parametrize("width", [40, 60, 110])
def test_lines_are_wrapped_and_commands_are_not(width: int) -> None:
    command = "    pip install --force-reinstall --no-cache-dir llama-cpp-python"
    finding = Finding("a topic", "warn", "word " * 40, f"do this:\n{command}")
    lines = shown(finding, 12, styled=False, width=width).split("\n")
    assert lines[0].startswith("warn  a topic       word word")
    assert lines[-1].endswith(command) and lines[-1].startswith(" " * 20)
    assert all(len(line) <= max(width, 40) for line in lines[:-1])
    styled = shown(finding, 12, styled=True, width=width)
    assert styled.startswith("\x1b[33mwarn\x1b[0m")


def test_as_json() -> None:
    rows = [Finding("a", "ok", "x"), Finding("b", "bad", "y", "z", 1.5)]
    said = json.loads(as_json(rows, base_url=None))
    assert said["ok"] is False and said["findings"][0] == {
        "topic": "a", "level": "ok", "text": "x", "advice": "",
    }  # fmt: skip
    assert said["findings"][1]["seconds"] == 1.5
