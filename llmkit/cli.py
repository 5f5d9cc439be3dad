"""The command ``llmkit``: serve, engine, tune, convert, bench."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from llmkit.config import ENGINE_OPTIONS
from llmkit.errors import EngineGoneError, LLMKitError
from llmkit.models.convert import TYPES
from llmkit.version import __version__

__all__ = ["main"]


LOOK_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 for an error (one clear line on stderr), 2 for wrong usage, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except LLMKitError as error:
        print(f"llmkit: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"llmkit: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmkit", description="Run a GGUF model and let programs use it through an OpenAI-compatible endpoint.")
    parser.add_argument("--version", action="version", version=f"llmkit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model, or all running engines, at http://HOST:PORT/v1")
    serve.add_argument("model", nargs="?", help="alias or path of a GGUF file; without it all engines of your notebooks are served")
    serve.add_argument("--host", help="address to listen on (127.0.0.1); others than loopback need a key")
    serve.add_argument("--port", type=int, help="port to listen on (3000; 0 takes a free one)")
    serve.add_argument("--api-key", help="key that callers must send; better in $LLMKIT_API_KEY, where `ps` does not show it")
    serve.add_argument("--log-level", help="debug, info, warning or error (info): how much is logged on standard error")
    serve.add_argument("--config", type=Path, help="TOML file of settings")
    serve.add_argument("--strict", action="store_true", default=None, help="refuse fields of requests that would otherwise be accepted and ignored")
    serve.add_argument("--drain-s", type=float, help="seconds that running requests may still take after SIGTERM (30)")
    serve.add_argument("--attach", type=int, metavar="PID", help="serve only the engines of this process, and end with it")
    _engine_options(serve)
    serve.set_defaults(run=_serve)
    engine = commands.add_parser("engine", help="hold a model for gateways and notebooks, without HTTP; ends with its standard input")
    engine.add_argument("model")
    _engine_options(engine)
    engine.set_defaults(run=_engine)
    tune = commands.add_parser("tune", help="measure which settings make a model fastest on this machine, and remember them")
    tune.add_argument("model", nargs="?", default="smollm2")
    tune.set_defaults(run=_tune)
    convert = commands.add_parser("convert", help="write a model folder of the Hugging Face kind (config.json, safetensors) as a GGUF file")
    convert.add_argument("folder", type=Path)
    convert.add_argument("-o", "--output", type=Path, help="the file to write (beside the folder, with its name)")
    convert.add_argument("--type", default="f16", choices=TYPES, help="type of the weights (f16)")
    convert.set_defaults(run=_convert)
    bench = commands.add_parser("bench", help="measure any OpenAI-compatible endpoint under load")
    from llmkit.bench import workload

    workload.add_arguments(bench)
    bench.set_defaults(run=workload.main)
    return parser


def _engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="name of the model for callers")
    parser.add_argument("--n-ctx", type=int, help="most tokens of one request (4096 at most by default)")
    parser.add_argument("--n-slots", type=int, help="requests computed at once (8 at most by default)")
    parser.add_argument("--n-gpu-layers", type=_layers, help="layers on the GPU (-1: all; auto, the default: as many as fit)")
    parser.add_argument("--threads", type=int, help="compute threads (all cores)")
    parser.add_argument("--kv-type", help="type of the KV cache's numbers: f16 (default), q8_0 or q4_0")
    parser.add_argument("--prefix-dir", help="folder where computed prefixes outlive the process")
    parser.add_argument("--target-itl-ms", type=float, help="time between two tokens of a stream that prompts of others must not stretch (500)")
    parser.add_argument("--draft", help="a smaller model of the same vocabulary that guesses tokens")
    parser.add_argument("--context-shift", action="store_true", default=None, help="a request that fills its context goes on without the older half of it")
    parser.add_argument("--share-prefixes", action="store_true", default=None, help="all callers share cached beginnings of prompts, not only each its own")
    parser.add_argument("--tuned", action="store_true", default=None, help="use what `llmkit tune` found best on this machine")


def _layers(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _serve(args: argparse.Namespace) -> int:
    from llmkit.config import read_settings
    from llmkit.gateway import standalone

    given = {
        k: getattr(args, k) for k in ("model", "host", "port", "api_key", "log_level", "strict", "drain_s", *ENGINE_OPTIONS) if getattr(args, k) is not None
    }
    return standalone.serve(read_settings(given, args.config), attach_pid=args.attach)


def _tune(args: argparse.Namespace) -> int:
    from llmkit.bench import tuner

    print(tuner.tune(args.model))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from llmkit.models.convert import convert_folder

    print(convert_folder(args.folder, args.output, args.type))
    return 0


def _engine(args: argparse.Namespace) -> int:
    options = {k: getattr(args, k) for k in ENGINE_OPTIONS if getattr(args, k) is not None}
    from llmkit.loading import load

    ended, loaded = threading.Event(), threading.Event()

    def watch() -> None:
        sys.stdin.buffer.read()  # whoever started us holds the other end: its end is ours, also while we load
        ended.set()
        if not loaded.is_set():
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with load(args.model, **options) as llm:
        loaded.set()
        sys.setswitchinterval(0.005)  # no cell is busy here: Python's own interval lets the engine finish its step undisturbed
        print(f"loaded {llm!r}", flush=True)
        while not ended.wait(LOOK_S):
            if llm.closed:
                raise EngineGoneError(llm.engine.gone or "the engine has ended")
    return 0
