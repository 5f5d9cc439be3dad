"""What a notebook shows and serves: charts, widgets, magics, tables and endpoints."""

__all__: list[str] = []
