"""Several GPUs and other backends: what llama.cpp is told, and what people are told.

There is no GPU here: ggml's list of devices is replaced, and llama.cpp's call is looked at.
"""

from __future__ import annotations

import ctypes
import gc
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeClient

import llmkit
from llmkit.backend import library
from llmkit.backend.advice import faster
from llmkit.backend.library import Device, Log
from llmkit.backend.model import LlamaModel
from llmkit.backend.placement import Placement
from llmkit.errors import InsufficientMemoryError, InvalidRequestError, ModelLoadError
from llmkit.models.devices import Gpu, places
from llmkit.models.gguf import read_header
from llmkit.models.memory import estimate
from llmkit.models.registry import resolve
from llmkit.notebook.monitor import GpuMemory, Monitor
from llmkit.settings.options import EngineOptions
from llmkit.settings.serving import read_settings
from llmkit.system.accelerators import Accelerator, accelerators

MIB = 1 << 20
TWO = [
    Device("CUDA0", "a GPU", True, 3000 * MIB, 4000 * MIB),
    Device("CUDA1", "a GPU", True, 1000 * MIB, 4000 * MIB),
]
NVIDIA = Accelerator("nvidia", "NVIDIA H100")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.runtime.assembly.gpus", lambda: TWO)


def test_the_options_in_every_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EngineOptions(tensor_split=[3, 1]).tensor_split == (3.0, 1.0)
    assert EngineOptions(tensor_split="3, 1").tensor_split == (3.0, 1.0)
    assert EngineOptions(split_mode="none", main_device=1).main_device == 1
    monkeypatch.setenv("LLMKIT_TENSOR_SPLIT", "0.5,0.25,0.25")
    file = tmp_path / "llmkit.toml"
    file.write_text('split_mode = "row"\nmain_device = 1\ntensor_split = [1, 2]\n')
    options = EngineOptions(**read_settings({}, file).engine)
    assert (options.split_mode, options.main_device) == ("row", 1)
    assert options.tensor_split == (0.5, 0.25, 0.25)
    # The way to a worker, and back.
    assert EngineOptions(**{**options.as_dict(), "tensor_split": [0.5, 0.25, 0.25]}) == options


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor_split": "3;1"},
        {"tensor_split": ""},
        {"tensor_split": ","},
        {"tensor_split": [0, 0]},
        {"tensor_split": [-1, 2]},
        {"tensor_split": [float("nan"), 1]},
        {"tensor_split": [1e308, 1e308]},
        {"tensor_split": [1] * 17},
        {"tensor_split": 3},
        {"tensor_split": ["a"]},
        {"tensor_split": [1, 1], "split_mode": "none"},
        {"split_mode": "rows"},
        {"split_mode": 1},
        {"main_device": -1},
        {"main_device": 16},
        {"main_device": True},
        {"main_device": 1},
    ],
)
def test_nonsense_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        EngineOptions(**wrong)


@pytest.mark.parametrize(
    "options, param",
    [
        ({"split_mode": "none", "main_device": 2}, "main_device"),
        ({"tensor_split": [1, 1, 1]}, "tensor_split"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there(options: dict[str, Any], param: str) -> None:
    for call in (llmkit.estimate, llmkit.load):
        with pytest.raises(InvalidRequestError, match="sees CUDA0, CUDA1") as error:
            call("smollm2", **options)
        assert error.value.param == param


@pytest.mark.model
def test_without_a_gpu_only_the_first_may_be_named() -> None:
    with pytest.raises(InvalidRequestError, match="sees no GPU"):
        llmkit.estimate("smollm2", split_mode="none", main_device=1)
    with pytest.raises(InvalidRequestError, match="sees no GPU"):
        llmkit.load("minilm", tensor_split=[1, 1])
    with llmkit.load("smollm2", n_ctx=256, n_slots=1, split_mode="row", tensor_split="1") as llm:
        assert llm.generate("a", max_tokens=1) and repr(llm).endswith("cpu)")


@pytest.mark.model
@pytest.mark.parametrize(
    "placement, told",
    [
        (None, (1, 0, [])),
        (Placement("none", 1), (0, 1, [])),
        (Placement("row", 2, (3.0, 0.0, 1.0)), (2, 2, [3.0, 0.0, 1.0])),
    ],
)
def test_what_llama_cpp_is_told(
    monkeypatch: pytest.MonkeyPatch, placement: Placement | None, told: tuple[int, int, list[float]]
) -> None:
    seen: list[tuple[int, int, list[float]]] = []

    def load(path: bytes, params: Any) -> None:
        gc.collect()
        churn = [(ctypes.c_float * 16)(*[7.0] * 16) for _ in range(100)]  # freed memory is reused
        most = library.C.llama_max_devices()
        given = list(params.tensor_split[:most]) if params.tensor_split else []
        assert len(churn) == 100 and not any(given[len(told[2]) :])
        seen.append((params.split_mode, params.main_gpu, given[: len(told[2])]))

    monkeypatch.setattr(library.C, "llama_model_load_from_file", load)
    with pytest.raises(ModelLoadError):
        LlamaModel(resolve("smollm2").path, placement=placement)
    assert seen == [told]


@pytest.mark.parametrize(
    "free, shares, expected",
    [
        ([3, 1], (), [0, 0, 0, 1]),
        ([3, 1], (1, 1), [0, 0, 1, 1]),
        ([3, 1], (0, 1), [1, 1, 1, 1]),
        ([3, 1], (1,), [0, 0, 0, 0]),
        ([0, 0], (), [0, 0, 1, 1]),
        ([5], (), [0, 0, 0, 0]),
        ([], (), []),
    ],
)
def test_layers_go_where_llama_cpp_puts_them(
    free: list[int], shares: tuple[float, ...], expected: list[int]
) -> None:
    assert places(4, [Gpu(f"CUDA{i}", n) for i, n in enumerate(free)], shares) == expected


@pytest.mark.usefixtures("two_gpus")
def test_an_estimate_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.runtime.assembly.accelerators", lambda: [NVIDIA])
    need = llmkit.estimate("smollm2", n_ctx=1024, n_slots=4, n_gpu_layers=-1)
    first, second = need.devices
    assert (first.name, second.name) == ("CUDA0", "CUDA1") and need.fits and not need.hint
    assert min(first.num_bytes, second.num_bytes) > 64 * MIB
    assert need.gpu_bytes == first.num_bytes + second.num_bytes
    assert "GiB free on CUDA0" in repr(need) and "GiB free on CUDA1" in repr(need)
    alone = llmkit.estimate("smollm2", n_ctx=1024, n_slots=4, split_mode="none", main_device=1)
    assert [gpu.name for gpu in alone.devices] == ["CUDA1"] and alone.gpu_free_bytes == 1000 * MIB
    other = llmkit.estimate("smollm2", n_ctx=1024, n_slots=4, tensor_split=[0, 1])
    assert other.devices[0].num_bytes == 0 < other.devices[1].num_bytes
    # It would fit into both together, but not the way it is spread.
    with pytest.raises(InsufficientMemoryError, match=r"of 0\.98 GiB free on CUDA1"):
        llmkit.load("smollm2", n_ctx=8192, n_slots=8, n_gpu_layers=-1, tensor_split=[0, 1])


def test_one_gpu_is_estimated_as_ever() -> None:
    info = read_header(resolve("smollm2").path)
    sizes: dict[str, Any] = {"n_ctx": 1024, "n_slots": 2, "free_bytes": 1 << 30}
    for layers in (0, 1, 7, 31, -1):
        short = estimate(info, n_gpu_layers=layers, gpu_free_bytes=1 << 30, **sizes)
        named = estimate(info, n_gpu_layers=layers, gpus=[Gpu("CUDA0", 1 << 30)], **sizes)
        assert short.gpu_bytes == named.gpu_bytes == named.devices[0].num_bytes
        halves = [Gpu("CUDA0", 1 << 30), Gpu("CUDA1", 1 << 30)]
        both = estimate(info, n_gpu_layers=layers, gpus=halves, **sizes)
        assert both.gpu_bytes >= short.gpu_bytes  # each needs buffers of its own
        assert both.weights_bytes == short.weights_bytes


def test_integrated_gpus_count_only_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Device("Vulkan0", "in the processor", True, 1, 2, True)
    for found, used in (
        ([inside, *TWO], TWO),
        ([inside], [inside]),
        ([Device("CPU", "", False, 1, 2)], []),
    ):
        monkeypatch.setattr(library, "devices", lambda found=found: found)
        assert library.gpus() == used


def test_the_buffers_of_each_gpu() -> None:
    log = Log()
    for line in (
        "load_tensors:        CUDA0 model buffer size =    92.00 MiB\n",
        "load_tensors:        CUDA1 model buffer size =    30.00 MiB\n",
        "load_tensors:   CPU_Mapped model buffer size =    28.69 MiB\n",
        "llama_kv_cache:      CUDA1 KV buffer size =    90.00 MiB\n",
        "load_tensors:   CUDA_Split model buffer size =    12.00 MiB\n",
    ):
        log.add(2, line)
    assert log.gpu_bytes() == {
        "CUDA0": 92 * MIB, "CUDA1": 120 * MIB, "CUDA (by rows)": 12 * MIB
    }  # fmt: skip
    assert log.device_bytes() == {"weights": 134 * MIB, "kv": 90 * MIB}


def test_the_monitor_shows_each_gpu(fake: FakeClient) -> None:
    memory = [GpuMemory("CUDA0", 400 * MIB, 4000 * MIB), GpuMemory("CUDA1", 50 * MIB, 4000 * MIB)]
    monitor = Monitor(fake, gpus=lambda: memory)
    monitor.stop()
    assert monitor.sample().vram == (450 * MIB, 8000 * MIB)
    assert "CUDA0" in monitor.html() and "CUDA1" in monitor.html()
    assert "on 2 GPUs" in repr(monitor)


@pytest.mark.parametrize(
    "built, devices, present, said",
    [
        (["CPU"], [], [], None),
        (["CUDA", "CPU"], ["CUDA0"], [NVIDIA], None),
        (["Vulkan", "CPU"], ["Vulkan0"], [NVIDIA], None),
        (["CPU"], [], [NVIDIA], r"H100.*not built for it.*make cuda.*\n.*-DGGML_CUDA=on"),
        (["CUDA", "CPU"], [], [NVIDIA], r"H100.*does not see it.*driver"),
        (["CPU"], [], [Accelerator("apple", "Apple's GPU")], r"make metal"),
        (["BLAS", "Metal", "CPU"], ["MTL0"], [Accelerator("apple", "Apple's GPU")], None),
        (["CPU"], [], [Accelerator("amd", "an AMD GPU")], r"make vulkan"),
        (["ROCm", "CPU"], ["ROCm0"], [Accelerator("amd", "an AMD GPU")], None),
    ],
)
def test_what_would_be_faster(
    built: list[str],
    devices: list[str],
    present: list[Accelerator],
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answer = faster(built, devices, present)
    if said is None:
        assert answer is None
    else:
        assert answer is not None
        assert re.search(said, answer, re.DOTALL), answer


def test_a_hidden_gpu_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides it" in (faster(["CUDA"], [], [NVIDIA]) or "")


def test_the_small_gpu_of_a_processor_warns_nobody() -> None:
    intel = Accelerator("intel", "an Intel GPU")
    assert faster(["CPU"], [], [intel], sure=True) is None
    assert "make vulkan" in (faster(["CPU"], [], [intel]) or "")


@pytest.mark.model
def test_an_estimate_says_what_would_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.runtime.assembly.accelerators", lambda: [NVIDIA])
    assert "make cuda" in repr(llmkit.estimate("smollm2"))
    assert "make cuda" not in repr(llmkit.estimate("smollm2", n_gpu_layers=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llmkit.load("smollm2", n_ctx=256, n_slots=1, n_gpu_layers=0).unload()


def test_the_gpus_that_the_system_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert accelerators(tmp_path) == []
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version\n")
    assert accelerators(tmp_path) == [Accelerator("nvidia", "an NVIDIA GPU")]
    for card in ("0000:01:00.0", "0000:02:00.0"):
        folder = tmp_path / "proc/driver/nvidia/gpus" / card
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t NVIDIA L4\nIRQ: 1\n")
    for name, vendor in (("card0", "0x10de"), ("card1", "0x1002"), ("card2", "0xdead")):
        device = tmp_path / "sys/class/drm" / name / "device"
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
    (tmp_path / "sys/class/drm/card1-HDMI-A-1").mkdir()
    assert accelerators(tmp_path) == [
        Accelerator("nvidia", "NVIDIA L4"),
        Accelerator("nvidia", "NVIDIA L4"),
        Accelerator("amd", "an AMD GPU"),
    ]


@pytest.mark.model
def test_this_build_names_its_backends() -> None:
    assert "CPU" in library.backends()
