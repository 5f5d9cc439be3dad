"""llama-index: complete, chat, stream, structured output."""

import asyncio
import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

URL = sys.argv[1]
llm = OpenAILike(
    model="smollm2",
    api_base=URL,
    api_key="k",
    is_chat_model=True,
    is_function_calling_model=True,
    temperature=0,
    max_tokens=40,
    context_window=1024,
)
question = [ChatMessage(role="user", content="Name one colour.")]
answer = llm.chat(question).message.content
assert answer
assert "".join(piece.delta or "" for piece in llm.stream_chat(question)) == answer
assert asyncio.run(llm.achat(question)).message.content == answer
plain = OpenAILike(
    model="smollm2", api_base=URL, api_key="k", is_chat_model=False, temperature=0, max_tokens=10
)
assert plain.complete("The sky is").text == "".join(
    piece.delta for piece in plain.stream_complete("The sky is")
)


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


person = llm.structured_predict(
    Person,
    __import__("llama_index.core.prompts", fromlist=["PromptTemplate"]).PromptTemplate(
        "Anna is 31 years old."
    ),
)
assert isinstance(person, Person), person


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


called = llm.chat_with_tools(
    [FunctionTool.from_defaults(fn=add)], user_msg="1+2?", tool_required=True
)
assert llm.get_tool_calls_from_response(called)[0].tool_name == "add"
