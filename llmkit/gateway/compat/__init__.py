"""Routes of the services that people come from: thin adapters over the pipeline of all dialects.

One module for each service, or for what two of them share. They take their shapes from those
services' sources. Where a service speaks OpenAI's language with a few words more, its schema is
OpenAI's with these words; no dialect knows of this room.
"""

__all__: list[str] = []
