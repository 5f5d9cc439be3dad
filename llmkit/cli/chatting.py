"""`llmkit chat` and `llmkit run`."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.completing import model_names
from llmkit.cli.options import with_options
from llmkit.errors import LLMKitError
from llmkit.settings.options import OPTIONS

if TYPE_CHECKING:
    from llmkit.cli.partners import Partner, Summary
    from llmkit.cli.terminal import Screen
    from llmkit.llm import LLM

__all__ = ["register"]

SMALL = "smollm2"

Prompt = Annotated[
    list[str] | None,
    typer.Argument(metavar="QUESTION", help="One question; without it, a conversation."),
]
System = Annotated[str, typer.Option(help="System message.")]
Files = Annotated[
    list[Path] | None,
    typer.Option("--file", "-f", metavar="PATH", help="Text file that goes with the question."),
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", metavar="PATH", help="Picture that goes with the question."),
]
NoPaths = Annotated[
    bool, typer.Option("--no-paths", help="Take @path as text: send no file that it names.")
]
Temperature = Annotated[float | None, typer.Option(help="0 is the likeliest answer.")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for one question.")]
Session = Annotated[
    str,
    typer.Option(metavar="NAME_OR_ID", help="Keep the conversation, or go on with a kept one."),
]


def register(app: typer.Typer) -> None:
    engine = [row for name, row in OPTIONS.items() if name != "isolated"]
    app.command(rich_help_panel="Use")(with_options(run, engine))
    app.command(rich_help_panel="Use")(chat)


def chat(
    question: Prompt = None,
    model: Annotated[
        str, typer.Option("--model", "-m", autocompletion=model_names, help="Which model.")
    ] = "",
    base_url: Annotated[str, typer.Option(help="Any OpenAI-compatible endpoint.")] = "",
    api_key: Annotated[
        str, typer.Option(help="Its key; by default $LLMKIT_API_KEY or $OPENAI_API_KEY.")
    ] = "",
    system: System = "",
    file: Files = None,
    image: Images = None,
    no_paths: NoPaths = False,
    session: Session = "",
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    json: Json = False,
) -> int:
    """Chat with a running model, or ask one question.

    Takes files and pipes: `git diff | llmkit chat "What changed?"`, `llmkit chat "Why? @log.txt"`.
    The model is the endpoint's, else the newest that you have running, else smollm2, loaded here.
    """
    from llmkit.cli.endpoint import Endpoint
    from llmkit.cli.partners import LocalPartner, RemotePartner

    sampling = _sampling(temperature=temperature, max_tokens=max_tokens, seed=seed)

    def open_partner(screen: Screen) -> Partner:
        if base_url:
            return RemotePartner(Endpoint(base_url, api_key), model, sampling, session)
        return LocalPartner(_running(model, screen), sampling, session)

    return _talk(open_partner, " ".join(question or []), system, file, image, json, not no_paths)


def run(
    model: Annotated[
        str, typer.Argument(autocompletion=model_names, help="Alias or path of a GGUF file.")
    ],
    question: Prompt = None,
    system: System = "",
    file: Files = None,
    image: Images = None,
    no_paths: NoPaths = False,
    session: Session = "",
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    json: Json = False,
    **given: Any,
) -> int:
    """Load a model and chat with it, or ask one question."""
    from llmkit.cli.partners import LocalPartner
    from llmkit.loading import load

    sampling = _sampling(temperature=temperature, max_tokens=max_tokens, seed=seed)

    def open_partner(_: Screen) -> Partner:
        return LocalPartner(load(model, **given), sampling, session)

    return _talk(open_partner, " ".join(question or []), system, file, image, json, not no_paths)


def _sampling(**given: Any) -> dict[str, Any]:
    """What was given, checked before anything is loaded."""
    from llmkit.protocol import SamplingParams

    sampling = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**sampling)
    return sampling


def _running(model: str, screen: Screen) -> LLM:
    """The model of that name, or the newest that chats; else it is loaded here."""
    from llmkit.bridge.connection import find_connections
    from llmkit.loading import attach, load

    for connection in find_connections():
        known = connection.model
        exact = f"{known.name}@{connection.origin.label}"
        chats = known.use == "generate"
        if model in (known.name, exact) or (not model and chats):
            try:
                return attach(exact)
            except LLMKitError as error:  # it has just ended
                screen.warn(f"llmkit: {exact}: {error}")
    if not model:
        screen.warn(f"llmkit: no model of yours is running; loading {SMALL}")
    return load(model or SMALL)


def _talk(
    open_partner: Callable[[Screen], Partner],
    question: str,
    system: str,
    files: list[Path] | None,
    images: list[Path] | None,
    as_json: bool,
    paths: bool,
) -> int:
    from llmkit.cli.attachments import piped_text, question_of, read_text, taken_apart
    from llmkit.cli.conversing import Chat, answer_once, told
    from llmkit.cli.terminal import Screen, sendable
    from llmkit.protocol import Message

    screen = Screen()
    named: list[tuple[str, str]] = []
    if paths:
        # Also in a log: an argument may hold text of others, and then they chose the file.
        say = lambda text: screen.warn(f"llmkit: {text}")  # noqa: E731
        question, named = taken_apart(question, screen.note, say)
    read = [(path.name, read_text(path)) for path in files or []]
    piped = piped_text(screen.note)
    text = sendable(question_of(question, [*read, *named], piped))
    person = sys.stdin is not None and sys.stdin.isatty()
    if not text and (as_json or not person):
        raise typer.BadParameter("there is no question: give one here or through a pipe")
    if images and not text:
        raise typer.BadParameter("--image goes with a question: give one here")
    with closing(open_partner(screen)) as partner:
        if system:
            others = [m for m in partner.messages if m.role != "system"]
            partner.messages = [Message("system", sendable(system)), *others]
        if not text:
            return Chat(partner, screen, paths=paths).run()
        if as_json:
            for _ in partner.answer(text, images or ()):
                pass
            print(json_module.dumps(_as_json(partner.name, partner.last)))
            return 0
        summary = answer_once(partner, text, screen, images or ())
        if screen.is_terminal:
            screen.note(told(summary))
    return 0


def _as_json(model: str, summary: Summary) -> dict[str, Any]:
    speed = summary.tokens_per_s
    return {
        "model": model,
        "answer": summary.text,
        "reasoning": summary.reasoning,
        "finish_reason": summary.finish_reason,
        "usage": {
            "prompt_tokens": summary.prompt_tokens,
            "completion_tokens": summary.completion_tokens,
        },
        "seconds": round(summary.seconds, 3),
        "tokens_per_s": None if speed is None else round(speed, 2),
    }
