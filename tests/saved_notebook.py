"""What a notebook that has run must hold for a reader without widgets."""

from __future__ import annotations

from nbformat import NotebookNode

WIDGET = "application/vnd.jupyter.widget-view+json"


def check_saved(notebook: NotebookNode) -> int:
    """No error, nothing on standard error, a picture, and a fallback beside each widget. Returns
    how many widgets there are."""
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    bundles = [o.data for o in outputs if o.output_type in ("display_data", "execute_result")]
    assert all("text/plain" in bundle for bundle in bundles)
    assert any("image/png" in bundle for bundle in bundles)
    fallbacks = [bundle["text/html"] for bundle in bundles if WIDGET in bundle]
    assert all("<svg" in html or "role=" in html for html in fallbacks)
    return len(fallbacks)
