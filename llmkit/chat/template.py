"""Chat messages to a prompt, by the model's own template in jinja2's sandbox. Pure; any thread.

A template comes from a file that anybody may have made: the sandbox keeps it from Python objects, and its output and loops are bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmkit.chat.sandbox import BUDGET, MAX_OUTPUT, Budget, make_environment
from llmkit.chat.tools import describe_tools, reasoning_form, tool_form
from llmkit.errors import InvalidRequestError
from llmkit.types import Message, Tool

if TYPE_CHECKING:
    import jinja2

__all__ = ["CHATML", "ChatTemplate"]

RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", BUDGET)
ROLES = ("system", "developer", "user", "assistant", "tool")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatTemplate:
    """A model's chat template.

    >>> t = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    >>> t.render([Message("user", "hi")])
    '[user]hi'

    ``bos`` and ``eos`` are the texts of the model's begin and end tokens. Raises `InvalidRequestError` when the template refuses the messages.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        self.source, self._bos, self._eos = source, bos, eos

    @cached_property
    def _template(self) -> jinja2.Template:
        import jinja2

        environment = make_environment()
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise InvalidRequestError(f"the model's chat template cannot be read ({error}); use a text prompt instead.", "messages") from error

    @cached_property
    def tool_form(self) -> str:
        """How the model writes calls of tools."""
        return tool_form(self.source)

    @cached_property
    def reasoning(self) -> str:
        """Whether the model reasons before it answers: "think" in tags that it opens itself, "think_begun" where the prompt
        opens the tag, "think_always" where it does that whatever is asked, "think_asked" where it does so on request; "harmony", or nothing."""
        form = reasoning_form(self.source)
        if form != "think":
            return form
        if self._begins_thinking():
            return "think_always" if self._begins_thinking(enable_thinking=False, thinking=False) else "think_begun"
        return "think_asked" if self._begins_thinking(enable_thinking=True, thinking=True) else form

    def _begins_thinking(self, **options: Any) -> bool:
        """Whether the prompt ends with the opening tag."""
        try:
            return self.render([Message("user", "?")], options=options).rstrip().endswith("<think>")
        except InvalidRequestError:
            return False

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: Sequence[Tool] = (), options: dict[str, Any] | None = None
    ) -> str:
        """The prompt text for these messages, ready for the assistant's turn. ``options`` are the template's own variables (``enable_thinking``, say)."""
        if not messages:
            raise InvalidRequestError("messages must hold at least one message.", "messages")
        for message in messages:
            if message.role not in ROLES:
                raise InvalidRequestError(f"messages: the role must be one of {', '.join(ROLES)}, not {message.role!r:.40}.", "messages")
        if self.tool_form == "general":
            plain = describe_tools(messages, tools)
            if tools and plain[0].role == "system" and messages[0].role not in ("system", "developer"):
                try:
                    return self._render(plain, add_generation_prompt, (), options)
                except InvalidRequestError:  # some templates refuse a system message: then the first of the user's says it
                    place = next((i for i, m in enumerate(plain) if m.role == "user"), None)
                    if place is None:
                        raise
                    plain[place] = replace(plain[place], content=f"{plain[0].content}\n\n{plain[place].content}")
                    del plain[0]
            messages, tools = plain, ()
        return self._render(messages, add_generation_prompt, tools, options)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Tool], options: dict[str, Any] | None) -> str:
        import jinja2

        values: dict[str, Any] = {
            **{k: v for k, v in (options or {}).items() if k not in RESERVED},
            **({"tools": [tool.function() for tool in tools]} if tools else {}),
            "messages": [m.as_dict() for m in messages],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._bos,
            "eos_token": self._eos,
            BUDGET: Budget(),
        }
        parts, size = [], 0
        try:
            for part in self._template.generate(values):
                size += len(part)
                if size > MAX_OUTPUT:
                    raise InvalidRequestError("the chat template produced too much text.", "messages")
                parts.append(part)
        except InvalidRequestError:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidRequestError(f"the model's chat template refuses these messages: {error}", "messages") from error
        return "".join(parts)
