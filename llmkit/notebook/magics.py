"""`%load_ext llmkit`: `%llm` for models, `%%llm` for a prompt. Errors are one line each."""

from __future__ import annotations

import argparse
import builtins
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand
from IPython.display import HTML, display

from llmkit.errors import InvalidRequestError, LLMKitError
from llmkit.media.addresses import digest_of
from llmkit.media.given import picture_file
from llmkit.notebook.thumbnails import thumbnail_html
from llmkit.runtime.loaded import loaded
from llmkit.sessions.running import Interrupted

__all__ = ["COMMANDS", "LLMMagics", "complete"]

COMMANDS = ("load", "list", "use", "unload", "estimate", "status", "serve", "profile")
# A variable with attributes and keys: {topic}, {row.text}, {names[0]}. Without such a variable, the
# braces are text.
PLACE = re.compile(r"(?<![{$])\{([A-Za-z_]\w*(?:\.[A-Za-z_]\w*|\[\w+\])*)\}(?!\})")

MISSING = object()
# What IPython keeps among the user's variables: answers and questions, and its own objects.
OWN_NAME = re.compile(r"_+|_i+|_i?\d+|_(?:dh|ih|oh)|__\w+__")
OF_IPYTHON = ("In", "Out", "exit", "get_ipython", "open", "quit")
# Of models that do not write: what they do, and how to have them do it.
OTHER_USES = {
    "hear": "hears and does not write; use .transcribe()",
    "speak": "speaks and does not write; use .say()",
    "draw": "draws and does not write; use .generate()",
    "embed": "makes vectors and does not write; use .embed() or .rerank()",
}


class Help(Exception):
    """The text of --help."""


class Parser(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        raise Help(self.format_help())


def cell_parser() -> Parser:
    parser = Parser(
        prog="%%llm",
        description="Send the cell to a model, as a chat message. {name} is replaced by the value "
        "of the variable of that name, if there is one.",
    )
    parser.add_argument("-m", "--model", help="a loaded model (default: the one in use)")
    parser.add_argument("-n", "--max-tokens", type=int, help="maximum tokens of the answer")
    parser.add_argument(
        "-t", "--temperature", type=float, help="0 always takes the likeliest token"
    )
    parser.add_argument("-s", "--system", help="system message")
    parser.add_argument(
        "-o", "--output", metavar="VARIABLE", help="keep the completion in this variable"
    )
    parser.add_argument(
        "-i",
        "--image",
        action="append",
        metavar="VARIABLE",
        default=[],
        help="send the picture in this variable, or in this file; may be given again",
    )
    parser.add_argument(
        "-r",
        "--raw",
        action="store_true",
        help="continue the text verbatim instead of answering it",
    )
    return parser


def line_parser() -> Parser:
    parser = Parser(prog="%llm", description="Load and inspect models; %%llm sends a cell to one.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    load = commands.add_parser(
        "load",
        prog="%llm load",
        description="Load a model; the variable llm (or --as NAME) holds it.",
    )
    load.add_argument("model", nargs="?", default="smollm2")
    load.add_argument("--as", dest="variable", default="llm")
    estimate = commands.add_parser(
        "estimate", prog="%llm estimate", description="The memory that a load would take."
    )
    estimate.add_argument("model", nargs="?", default="smollm2")
    for parser_ in (load, estimate):
        parser_.add_argument("--n-ctx", type=int, help="maximum tokens of one request")
        parser_.add_argument("--n-slots", type=int, help="concurrent requests")
    commands.add_parser("list", prog="%llm list", description="List the models loaded here.")
    for name, text in (
        ("use", "Use this model for the following cells."),
        ("unload", "Free a model's memory."),
        ("status", "Show a model's counters."),
        ("serve", "Show where other programs reach a model."),
        ("profile", "Measure a model's speed."),
    ):
        command = commands.add_parser(name, prog=f"%llm {name}", description=text)
        command.add_argument("model", nargs=None if name == "use" else "?")
    return parser


@magics_class
class LLMMagics(Magics):
    """The magics of one shell; ``used`` is the name of the model that answers cells.

    ``load`` and ``estimate`` are `llmkit.load` and `llmkit.estimate`.
    """

    def __init__(self, shell: Any, load: Callable[..., Any], estimate: Callable[..., Any]) -> None:
        super().__init__(shell)
        self._load_model, self._estimate_model = load, estimate
        self.used: str | None = None

    @no_var_expand
    @line_cell_magic
    def llm(self, line: str, cell: str | None = None) -> Any:
        """%llm COMMAND, or %%llm [OPTIONS] and a prompt; see --help."""
        try:
            return self._line(line) if cell is None else self._cell(line, cell)
        except Help as text:
            print(text)
        except KeyboardInterrupt as error:
            raise error if isinstance(error, Interrupted) else Interrupted("stopped") from None
        except (LLMKitError, OSError, TypeError) as error:
            raise UsageError(str(error)) from None
        return None

    @property
    def _variables(self) -> dict[str, Any]:
        assert self.shell is not None
        variables: dict[str, Any] = self.shell.user_ns
        return variables

    def _cell(self, line: str, cell: str) -> None:
        options = cell_parser().parse_args([self._expand(word) for word in _split(line)])
        llm = self._writer(options.model)
        prompt = (cell if options.raw else self._expand(cell)).strip()
        if not prompt:
            raise UsageError("%%llm: the cell is empty; write a prompt below the first line.")
        sampling = {"max_tokens": options.max_tokens, "temperature": options.temperature}
        sampling = {k: v for k, v in sampling.items() if v is not None}
        if options.raw:
            if options.image:
                raise UsageError("%%llm: --raw sends no pictures; leave it out.")
            stream = llm.stream(prompt, **sampling)
        else:
            system = [{"role": "system", "content": options.system}] if options.system else []
            images = [self._picture(name) for name in options.image]
            stream = llm.chat(
                [*system, {"role": "user", "content": prompt}],
                images=images,
                stream=True,
                **sampling,
            )
            if images:
                shown = "".join(thumbnail_html(each, digest_of(each)) for each in images)
                page = HTML(shown)  # type: ignore[no-untyped-call]
                display(page)  # type: ignore[no-untyped-call]
        try:
            for piece in stream:
                print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            stream.close()
            kept = options.output or "llm.last"
            raise Interrupted(f"generation stopped; the text so far is in {kept}") from None
        finally:
            if options.output:
                self._variables[options.output] = stream.wait(1.0) or llm.last

    def _picture(self, name: str) -> bytes:
        """The picture in a variable, such as df.photo or photos[0], or else in a file."""
        found = _found(self._variables, name)
        return picture_file(name if found is None else found)

    def _expand(self, text: str) -> str:
        return PLACE.sub(self._value, text)

    def _value(self, match: re.Match[str]) -> str:
        value = _found(self._variables, match[1], MISSING)
        is_text = value is MISSING or self._is_not_the_users(re.split(r"\W", match[1])[0])
        return match[0] if is_text else str(value)

    def _is_not_the_users(self, name: str) -> bool:
        """Whether a variable is IPython's or Python's own: pasted code has such names in braces."""
        if OWN_NAME.fullmatch(name):
            return True
        value, hidden = self._variables[name], getattr(self.shell, "user_ns_hidden", {})
        is_ipythons = name in OF_IPYTHON and value is hidden.get(name, MISSING)
        return is_ipythons or value is vars(builtins).get(name, MISSING)

    def _line(self, line: str) -> Any:
        options = line_parser().parse_args(_split(line) or ["--help"])
        run: Callable[[argparse.Namespace], Any] = getattr(self, f"_{options.command}")
        return run(options)

    def _load(self, options: argparse.Namespace) -> Any:
        llm = self._load_model(options.model, n_ctx=options.n_ctx, n_slots=options.n_slots)
        self._variables[options.variable] = llm
        if llm.model.use == "generate":
            self.used = llm.name
        return llm

    def _list(self, _: argparse.Namespace) -> None:
        if not loaded.living():
            print("No model is loaded here; %llm load smollm2 loads one.")
        for name, llm in loaded.living().items():
            print(("* " if name == self._used() else "  ") + repr(llm))

    def _use(self, options: argparse.Namespace) -> None:
        self.used = self._model(options.model).name

    def _unload(self, options: argparse.Namespace) -> None:
        self._model(options.model).unload()

    def _estimate(self, options: argparse.Namespace) -> Any:
        return self._estimate_model(options.model, n_ctx=options.n_ctx, n_slots=options.n_slots)

    def _status(self, options: argparse.Namespace) -> None:
        llm = self._model(options.model)
        s = llm.stats
        print(llm)
        print(
            f"{s.num_running} running, {s.num_waiting} waiting; "
            f"KV {s.kv_used_tokens} of {s.kv_capacity_tokens} tokens, {s.kv_cached_tokens} cached"
        )
        print(
            f"{s.requests_total} requests: {s.prompt_tokens_total} tokens in "
            f"({s.cached_tokens_total} from the cache), {s.generation_tokens_total} out"
        )

    def _serve(self, options: argparse.Namespace) -> Any:
        return self._model(options.model).serve()

    def _profile(self, options: argparse.Namespace) -> Any:
        return self._writer(options.model).profile()

    def _used(self) -> str | None:
        if self.used in loaded.living():
            return self.used
        latest = list(reversed(loaded.living().items()))
        writing = [name for name, handle in latest if handle.model.use == "generate"]
        return next(iter([*writing, *(name for name, _ in latest)]), None)

    def _writer(self, name: str | None) -> Any:
        """The model of a cell. Raises `InvalidRequestError` for one that writes no text."""
        llm = self._model(name)
        if llm.model.use in OTHER_USES:
            raise InvalidRequestError(f"{llm.name!r} {OTHER_USES[llm.model.use]}.", "model")
        return llm

    def _model(self, name: str | None) -> Any:
        wanted = name or self._used()
        if wanted is None:
            raise InvalidRequestError(
                "no model is loaded here; %llm load smollm2 loads one.", "model"
            )
        if wanted not in loaded.living():
            raise InvalidRequestError(
                f"no model {wanted!r} is loaded here; "
                f"loaded: {', '.join(loaded.living()) or 'none'}.",
                "model",
            )
        return loaded.living()[wanted]


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"%llm: {error}") from None


def _found(variables: dict[str, Any], place: str, default: Any = None) -> Any:
    """The value of a variable, with attributes and keys."""
    name, *path = re.findall(r"\w+|\[\w+\]", place) or [""]
    try:
        value = variables[name]
        for part in path:
            value = _item(value, part[1:-1]) if part.startswith("[") else getattr(value, part)
    except (KeyError, AttributeError, IndexError, TypeError):
        return default
    return value


def _item(value: Any, key: str) -> Any:
    return (
        value[int(key)]
        if key.isdecimal() and not (isinstance(value, dict) and key in value)
        else value[key]
    )


def complete(_: Any, event: Any) -> list[str]:
    """Completions after %llm: commands, then model names."""
    from llmkit.models.registry import ALIASES

    words: Sequence[str] = event.line.split()
    done = len(words) - (0 if event.line.endswith(" ") else 1)
    if done <= 1:
        return list(COMMANDS)
    return sorted(ALIASES) if words[1] in ("load", "estimate") else list(loaded.living())
