"""The workloads of `llmkit bench`: the contents of each request.

Deterministic in (seed, index), so that every arm of a comparison gets the same requests.
"""

from __future__ import annotations

import random
from typing import Any

__all__ = ["WORKLOADS", "body", "prompt_text"]

WORKLOADS = {
    "unique": "every prompt is different: no cache helps",
    "shared-prefix": "all prompts begin with the same --prefix-words",
    "copy": "each prompt is a passage and the beginning of its copy",
    "json": "answers are constrained to a JSON schema",
    "long": "a prompt of --long-words arrives while the others stream",
}
VOCABULARY = """
able air art bank bird blue boat book bread bridge brother cause chair child circle city clear cloud
coast color corner cost country cup dance dark deal door dream dry earth east edge energy engine
fact fall farm field fire fish floor flower form friend fruit game glass gold grass green group hand
heart heat hill history home horse hour house idea inch iron island job key king lake land law leaf
letter life line list machine map mark mile milk mind model moon morning mouth music name night
noise north note ocean office oil order paint pair paper part path people piece plan plant point
power price queen question rain reason rest ring river road rock roof room root rule salt sand
school sea seat ship side sign sky sleep snow song sound south space stage star state step stone
store story street summer sun table task tea test thing thought town trade train tree truth valley
value village voice wall war watch water wave week west wheel wind window winter wish word
""".split()  # noqa: SIM905
PEOPLE = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "minItems": 30,
            "maxItems": 30,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 16},
                    "age": {"type": "integer", "minimum": 0, "maximum": 120},
                    "role": {"enum": ["baker", "doctor", "farmer", "teacher"]},
                },
                "required": ["name", "age", "role"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["people"],
    "additionalProperties": False,
}


def prompt_text(seed: int, index: int | str, num_words: int) -> str:
    """A prompt of about one token per word, unique to (seed, index): no prefix cache helps."""
    rng = random.Random(f"{seed}/{index}")
    return " " + " ".join(rng.choices(VOCABULARY, k=num_words))


def body(
    workload: str, seed: int, index: int, *, prompt_words: int, prefix_words: int
) -> dict[str, Any]:
    """The fields of a workload's request: its prompt, and what the workload adds."""
    prompt = prompt_text(seed, index, prompt_words)
    if workload == "shared-prefix":
        return {"prompt": prompt_text(seed, "prefix", prefix_words) + prompt, "ignore_eos": True}
    if workload == "copy":
        words = prompt.split()
        return {
            "prompt": f"Text:\n{prompt}\n\nThe same text again:\n {' '.join(words[:24])}",
            "ignore_eos": True,
        }
    if workload == "json":
        schema = {
            "type": "json_schema",
            "json_schema": {"name": "people", "schema": PEOPLE, "strict": True},
        }
        # llama-server's /completions takes the schema in its own field, json_schema.
        return {
            "prompt": f"{prompt}\n\nA JSON list of people:\n",
            "response_format": schema,
            "json_schema": PEOPLE,
        }
    return {"prompt": prompt, "ignore_eos": True}
