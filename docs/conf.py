"""Sphinx: pages in MyST Markdown, the reference from docstrings, the lessons as they were run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "jupyter_ext")]

from llmkit.settings.entries import KEY_OPTIONS, MODEL_OPTIONS  # noqa: E402
from llmkit.settings.gateway import GATEWAY_OPTIONS  # noqa: E402
from llmkit.settings.hub import HUB_OPTIONS  # noqa: E402
from llmkit.settings.listing import as_toml  # noqa: E402
from llmkit.settings.options import OPTIONS  # noqa: E402
from llmkit.settings.quotas import QUOTA_OPTIONS  # noqa: E402
from llmkit.settings.sampling import SAMPLING_OPTIONS  # noqa: E402
from llmkit.settings.table import Option  # noqa: E402
from llmkit.version import __version__  # noqa: E402

project = "llmkit"
copyright = "the llmkit authors, MIT license"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["**.ipynb_checkpoints"]
default_role = "py:obj"  # `name` in a docstring: a link where it is documented, else just code
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js: dict[str, Any] = {}  # the lessons have none; nothing is fetched

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "exclude-members": "__init__, __new__"}
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "pydata_sphinx_theme"
html_title = f"llmkit {__version__}"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["llmkit.css"]
html_sidebars = {page: [] for page in ("start", "performance", "reliability", "changelog")}
html_theme_options = {
    "logo": {"text": "llmkit"},
    "navbar_end": ["theme-switcher"],
    "show_prev_next": True,
    "show_nav_level": 1,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

HANDLES = ("LLM", "Session", "Stream")  # made by other calls, so their constructors are nobody's
PARAMETER = re.compile(r"(\w+): (\S.*)")
GROUP = re.compile(r"([A-Z][\w ]*):")


def copy_lessons() -> None:
    """Bring the lessons in, with links that fit their place here; what did not change stays."""
    folder = DOCS / "lessons"
    folder.mkdir(exist_ok=True)
    lessons = {path.name: path for path in (ROOT / "notebooks").glob("*.ipynb")}
    for old in folder.iterdir():
        if old.name not in lessons:
            old.unlink()
    for name, path in lessons.items():
        lesson = json.loads(path.read_text(encoding="utf-8").replace("](../docs/", "](../"))
        lesson["metadata"]["language_info"]["pygments_lexer"] = "ipython3"  # knows magics
        text = json.dumps(lesson)
        target = folder / name
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


copy_lessons()


def place_links(app: Sphinx, name: str, source: list[str]) -> None:
    """Links that lead to files of the repository, to the same content here."""
    source[0] = re.sub(r"\]\(((?:\.\./)*)\.\./notebooks/", r"](\1lessons/", source[0])


def lay_out(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Docstrings name parameters as ``name: sentence``, one a line: a list of them."""
    found: list[str] = []
    for line in lines:
        bare = line.strip()
        if group := GROUP.fullmatch(bare):
            found += ["", f"**{group[1]}**", ""]
        elif parameter := PARAMETER.fullmatch(bare):
            if found and found[-1] and not found[-1].startswith("* "):
                found.append("")
            found.append(f"* ``{parameter[1]}``: {parameter[2]}")
        else:
            if bare and found and found[-1].startswith("* "):
                found.append("")
            found.append(line)
    lines[:] = found


def hide_constructor(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    return ("", returns) if what == "class" and name.endswith(HANDLES) else None


class SettingsTable(SphinxDirective):
    """A table of settings from the code: ``{settings} engine``, ``{settings} gateway`` and so on.

    Those that can change while a server runs are marked.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        rows = SETTINGS[self.arguments[0]].values()
        has_live = any(row.live for row in rows)
        lines = ["| setting | what it does | values | default |" + " live |" * has_live]
        lines += ["|---|---|---|---|" + "---|" * has_live]
        lines += [_row(row, has_live) for row in rows]
        container = nodes.container()
        self.state.nested_parse(StringList(lines), 0, container)
        return container.children


def _row(row: Option, has_live: bool) -> str:
    values = f"{row.range} {row.unit}".strip() or KINDS.get(row.kind, row.kind)
    default = "" if row.default in (None, (), "", False) else f"`{as_toml(row.default)}`"
    live = f" {'yes' if row.live else ''} |" if has_live else ""
    sentence = row.help.replace("|", "\\|")
    return f"| `{row.name}` | {sentence} | {values} | {default} |{live}"


SETTINGS = {
    "gateway": GATEWAY_OPTIONS,
    "engine": OPTIONS,
    "sampling": SAMPLING_OPTIONS,
    "models": MODEL_OPTIONS,
    "keys": KEY_OPTIONS,
    "hub": HUB_OPTIONS,
    "quota": QUOTA_OPTIONS,
}
KINDS = {
    "flag": "true or false",
    "switch": "true or false",
    "layers": '`"auto"`, -1 or a number',
    "adapters": "paths",
    "shares": "numbers",
    "path": "path",
    "secret": "text",
    "texts": "list of texts",
    "globs": "list of names or globs",
    "origins": "list of origins",
    "networks": "list of addresses or networks",
    "url": "address",
    "moment": "date or time",
}


def setup(app: Sphinx) -> None:
    app.add_directive("settings", SettingsTable)
    app.connect("source-read", place_links)
    app.connect("autodoc-process-docstring", lay_out)
    app.connect("autodoc-process-signature", hide_constructor)
