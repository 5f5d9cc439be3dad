"""langchain-openai: chat, stream, tools, structured output, batch, embeddings."""

import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

URL, EMBEDDING_URL = sys.argv[1:3]
chat = ChatOpenAI(
    base_url=URL,
    api_key="k",
    model="smollm2",
    temperature=0,
    max_completion_tokens=40,
    stream_usage=True,
)

answer = chat.invoke("Name one colour.")
assert answer.content and answer.usage_metadata["output_tokens"] > 0, answer
pieces = list(chat.stream("Name one colour."))
assert "".join(p.content for p in pieces) == answer.content and len(pieces) > 2
assert any(p.usage_metadata for p in pieces), "usage arrives with the stream"
assert [a.content for a in chat.batch(["Name one colour."] * 3)] == [answer.content] * 3


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


for method in ("json_schema", "function_calling"):
    person = chat.with_structured_output(Person, method=method).invoke("Anna is 31 years old.")
    assert isinstance(person, Person) and 0 <= person.age <= 120, (method, person)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


called = chat.bind_tools([add], tool_choice="required", parallel_tool_calls=False).invoke("1+2?")
assert (
    called.tool_calls[0]["name"] == "add" and add.invoke(called.tool_calls[0]["args"]) is not None
), called

vectors = OpenAIEmbeddings(
    base_url=EMBEDDING_URL, api_key="k", model="default", check_embedding_ctx_length=False
).embed_documents(["a cat", "a dog"])
assert len(vectors) == 2 and len(vectors[0]) == 384

responses = ChatOpenAI(
    base_url=URL,
    api_key="k",
    model="smollm2",
    temperature=0,
    max_completion_tokens=20,
    use_responses_api=True,
)
assert responses.invoke("Name one colour.").text
assert "".join(p.text for p in responses.stream("Name one colour."))
