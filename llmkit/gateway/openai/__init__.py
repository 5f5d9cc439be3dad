"""OpenAI's dialect: chat, completions, responses, embeddings and lists of models."""

__all__: list[str] = []
