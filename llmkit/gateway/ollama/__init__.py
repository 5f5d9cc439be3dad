"""Ollama's dialect: chat, generate, embeddings and lists of models."""

__all__: list[str] = []
