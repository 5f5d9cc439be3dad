"""What an image installs of pyproject.toml: all that llmkit needs there, and no more.

    python3 requirements.py serve|user PYPROJECT [EXTRA ...]

Prints one requirement a line, for `pip install -r`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

# What each image leaves out: it is imported only where pictures and widgets are drawn, or where a
# model is computed.
WITHOUT = {
    "serve": {"matplotlib", "ipywidgets"},
    "user": {"llama-cpp-python", "llguidance", "gguf", "safetensors"},
}


def main(image: str, pyproject: str, *extras: str) -> None:
    project = tomllib.loads(Path(pyproject).read_text())["project"]
    optional = project.get("optional-dependencies", {})
    wanted = [*project["dependencies"], *(each for extra in extras for each in optional[extra])]
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)
        if name and name[0].lower() not in WITHOUT[image]:
            print(requirement)


if __name__ == "__main__":
    main(*sys.argv[1:])
