"""Chat messages rendered to a prompt by the model's template, in a sandbox. Pure; any thread."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmkit.chat.bounds import MAX_OUTPUT, Budget, metered
from llmkit.chat.conversation import tool_dict
from llmkit.chat.manners import Manners, as_dicts, find_manners
from llmkit.chat.sandbox import make_environment
from llmkit.chat.telling import Kind, fitted, lost
from llmkit.chat.tools import reasoning_form, tool_form
from llmkit.errors import InvalidRequestError
from llmkit.protocol import Message, Tool, ToolCall

if TYPE_CHECKING:
    import jinja2

__all__ = ["CHATML", "RESERVED", "ChatTemplate"]

RESERVED = frozenset(
    (
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
    )
)
TOLD_FORMS = ("general", "deepseek", "hermes", "qwen3_coder", "glm", "harmony")
TRIAL_STEPS = 400_000  # in total, for probing what a template accepts
ROLES = ("system", "developer", "user", "assistant", "tool")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatTemplate:
    """A model's chat template.

    >>> t = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    >>> t.render([Message("user", "hi")])
    '[user]hi'

    ``bos`` and ``eos`` are the texts of the model's begin and end tokens. Raises
    `InvalidRequestError` if the template refuses the messages.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        self.source, self.bos, self.eos = source, bos, eos
        self._trials = Budget(TRIAL_STEPS)

    def compile(self) -> None:
        """Compile it now, not with the first prompt, which raises what is wrong with it."""
        with contextlib.suppress(InvalidRequestError):
            self._template  # noqa: B018

    @cached_property
    def _template(self) -> jinja2.Template:
        import jinja2

        try:
            return make_environment().from_string(self.source)
        except (
            jinja2.TemplateError,
            SyntaxError,
            ValueError,
            MemoryError,
            RecursionError,
            OverflowError,
        ) as error:
            raise InvalidRequestError(
                f"the model's chat template does not compile ({error!s:.300}); "
                "use a text prompt instead.",
                "messages",
            ) from error

    @cached_property
    def tool_form(self) -> str:
        """The form in which the model writes tool calls.

        Its own, or the general one if the template does not describe tools and we have no prompt
        for that form.
        """
        form = tool_form(self.source)
        return form if form in TOLD_FORMS or self.manners.tools else "general"

    @cached_property
    def manners(self) -> Manners:
        """What the template accepts, probed once."""

        def render(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> str | None:
            try:
                return self._run(messages, True, tools, {}, self._trials)
            except InvalidRequestError:
                return None

        return find_manners(render, self.source)

    @cached_property
    def reasoning(self) -> str:
        """How the model reasons before it answers.

        "think": in tags that it opens itself; "think_begun": the prompt opens the tag;
        "think_always": even if told not to; "think_asked": only on request; "harmony"; or "".
        """
        form = reasoning_form(self.source)
        if form != "think":
            return form
        if self._begins_thinking():
            return (
                "think_always"
                if self._begins_thinking(enable_thinking=False, thinking=False)
                else "think_begun"
            )
        return "think_asked" if self._begins_thinking(enable_thinking=True, thinking=True) else form

    @cached_property
    def reasons_after_results(self) -> bool:
        """Whether the prompt opens the tag after a tool result too."""
        call = ToolCall("call00001", "f", "{}")
        talk = [
            Message("user", "?"),
            Message("assistant", tool_calls=(call,)),
            Message("tool", "!", name="f", tool_call_id=call.call_id),
        ]
        try:
            return self.render(talk).rstrip().endswith("<think>") or not self._begins_thinking()
        except InvalidRequestError:
            return True

    def _begins_thinking(self, **options: Any) -> bool:
        """Whether the prompt ends with the opening tag."""
        try:
            return (
                self._run([{"role": "user", "content": "?"}], True, (), options, self._trials)
                .rstrip()
                .endswith("<think>")
            )
        except InvalidRequestError:
            return False

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Tool] = (),
        options: dict[str, Any] | None = None,
        continue_final: bool = False,
    ) -> str:
        """The prompt for these messages, ready for the assistant's turn.

        With ``continue_final`` it ends where the last message does. ``options`` are the template's
        own variables (such as ``enable_thinking``).
        """
        if not messages:
            raise InvalidRequestError("messages must hold at least one message.", "messages")
        for message in messages:
            if message.role not in ROLES:
                raise InvalidRequestError(
                    f"messages: the role must be one of {', '.join(ROLES)}, "
                    f"not {message.role!r:.40}.",
                    "messages",
                )
        options = options or {}
        reserved = sorted(options.keys() & RESERVED)
        if reserved:
            raise InvalidRequestError(
                f"chat_template_kwargs: {reserved[0]} is set by the server "
                "and cannot be overridden.",
                "chat_template_kwargs",
            )
        general, manners = self.tool_form == "general", self.manners
        refusal: InvalidRequestError | None = None
        incomplete: str | None = None
        way: tuple[Manners, bool] | None = (manners, general)
        while way is not None:
            adapted, described = fitted(messages, tools, way[0], self.tool_form, way[1])
            missing: set[Kind] = set()
            try:
                text = self._render(
                    adapted, way[0], add_generation_prompt, described, options, continue_final
                )
                missing = lost(text, messages, tools)
                if not missing:
                    return text
                incomplete = incomplete or text
            except InvalidRequestError as error:
                refusal = refusal or error
                if general or not (tools or any(m.tool_calls for m in messages)):
                    break
            way = _another_way(*way, missing)
        if incomplete is None:
            assert refusal is not None
            raise refusal
        return incomplete

    def _render(
        self,
        messages: list[Message],
        manners: Manners,
        add_generation_prompt: bool,
        tools: Sequence[Tool],
        options: dict[str, Any],
        continue_final: bool,
    ) -> str:
        if not continue_final:
            return self._run(as_dicts(messages, manners), add_generation_prompt, tools, options)
        if messages[-1].role != "assistant" or messages[-1].tool_calls:
            raise InvalidRequestError(
                "messages: only a final assistant message without tool calls can be continued.",
                "messages",
            )
        mark = secrets.token_hex(12)
        messages[-1] = replace(messages[-1], content=messages[-1].text + mark)
        prompt = self._run(as_dicts(messages, manners), False, tools, options)
        text, shown, _ = prompt.rpartition(mark)
        if not shown:
            raise InvalidRequestError(
                "messages: the last message cannot be continued: the model's chat template does "
                "not show it.",
                "messages",
            )
        return text

    def _run(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Tool],
        options: dict[str, Any],
        budget: Budget | None = None,
    ) -> str:
        """Render; any failure of the template becomes an `InvalidRequestError`."""
        import jinja2

        values: dict[str, Any] = {
            **options,
            **({"tools": [tool_dict(tool) for tool in tools]} if tools else {}),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos,
            "eos_token": self.eos,
        }
        parts, size = [], 0
        template = self._template
        try:
            with metered(budget):
                for part in template.generate(values):
                    size += len(part)
                    if size > MAX_OUTPUT:
                        raise InvalidRequestError(
                            "the chat template produced too much text.", "messages"
                        )
                    parts.append(part)
        except InvalidRequestError:
            raise
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error!s:.500}", "messages"
            ) from error
        return "".join(parts)


def _another_way(
    manners: Manners, plainly: bool, missing: set[Kind]
) -> tuple[Manners, bool] | None:
    """What to try next after a template refused its messages or dropped some of them.

    (It may look at the last message, for example.) None once everything was tried.
    """
    if "words" in missing and manners.words:
        return replace(manners, words=False), plainly
    if "system" in missing and (manners.system or manners.developer):
        return replace(manners, system=False, later_system=False, developer=False), plainly
    if (not missing or missing & {"tools", "rest"}) and manners.tools:
        return replace(manners, tools=False), plainly
    return None if plainly else (replace(manners, repeats=False), True)
