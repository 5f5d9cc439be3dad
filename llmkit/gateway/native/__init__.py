"""Routes of no dialect: tokens, templates, rerank.

llama-server and vLLM define them with OpenAI's messages, tools and common fields, so these schemas
are imported from OpenAI's room.
"""

__all__: list[str] = []
