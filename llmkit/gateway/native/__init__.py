"""Routes of no dialect: tokens, templates, rerank."""

__all__: list[str] = []
