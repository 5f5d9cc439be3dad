"""The command `llmkit`: a file for each group of commands."""

from llmkit.cli.app import main

__all__ = ["main"]
