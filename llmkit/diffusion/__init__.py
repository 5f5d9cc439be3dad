"""Models that draw, by stable-diffusion.cpp. Nothing of it is imported at the start."""

__all__: list[str] = []
