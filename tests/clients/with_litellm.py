"""litellm: completion, stream, tools, JSON schema, errors, embeddings."""

import asyncio
import sys

import litellm
from pydantic import BaseModel, Field

URL, EMBEDDING_URL = sys.argv[1:3]
litellm.telemetry = False
SAME = {
    "model": "openai/smollm2",
    "api_base": URL,
    "api_key": "k",
    "temperature": 0,
    "max_tokens": 30,
}
QUESTION = [{"role": "user", "content": "Name one colour."}]

answer = litellm.completion(messages=QUESTION, **SAME)
assert answer.choices[0].message.content and answer.usage.completion_tokens > 0
chunks = list(
    litellm.completion(
        messages=QUESTION, stream=True, stream_options={"include_usage": True}, **SAME
    )
)
assert (
    "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    == answer.choices[0].message.content
)
assert (
    litellm.stream_chunk_builder(chunks, messages=QUESTION).usage.completion_tokens
    == answer.usage.completion_tokens
)
assert (
    asyncio.run(litellm.acompletion(messages=QUESTION, **SAME)).choices[0].message.content
    == answer.choices[0].message.content
)
assert (
    litellm.text_completion(
        prompt="The sky is", **{**SAME, "model": "text-completion-openai/smollm2"}
    )
    .choices[0]
    .text
)

parameters = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 10}},
    "required": ["city"],
    "additionalProperties": False,
}
tools = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": parameters,
        },
    }
]
called = litellm.completion(
    messages=[{"role": "user", "content": "How warm is Rome?"}],
    tools=tools,
    tool_choice="required",
    **SAME,
)
assert called.choices[0].message.tool_calls[0].function.name == "weather", called


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


shaped = litellm.completion(
    messages=[{"role": "user", "content": "Anna is 31."}], response_format=Person, **SAME
)
Person.model_validate_json(shaped.choices[0].message.content)

try:
    litellm.completion(messages=QUESTION, **{**SAME, "model": "openai/nobody"})
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("an unknown model is an error")

found = litellm.embedding(
    model="openai/default", input=["a cat"], api_base=EMBEDDING_URL, api_key="k"
)
assert len(found.data[0]["embedding"]) == 384
