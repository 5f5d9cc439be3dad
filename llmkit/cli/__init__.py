"""The command `llmkit`: a file for each group of commands."""

from llmkit.cli.early import main

__all__ = ["main"]
