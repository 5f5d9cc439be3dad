"""instructor: pydantic models through tools and through a JSON schema, whole and partial."""

import sys

import instructor
import openai
from pydantic import BaseModel, Field

URL = sys.argv[1]


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


ASKED = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Anna is 31 years old."}],
    "temperature": 0,
    "max_tokens": 80,
}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="k"), mode=mode)
    person = client.chat.completions.create(response_model=Person, max_retries=0, **ASKED)
    assert isinstance(person, Person), (mode, person)
partial = list(client.chat.completions.create_partial(response_model=Person, **ASKED))
assert len(partial) > 1 and partial[-1].age == person.age
