"""Small charts as inline SVG: offline, in any frontend and theme, with their values as text.

Pure functions; all text is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = [
    "BLUE",
    "GREEN",
    "NO_MATH",
    "ORANGE",
    "PURPLE",
    "bar",
    "card",
    "marks",
    "size_text",
    "sparkline",
    "table",
]

# Keeps MathJax 2 and 3 from typesetting text between two $ signs, such as prices.
NO_MATH = "tex2jax_ignore mathjax_ignore"
# Contrast of at least 3:1 (for graphics) on white and on Jupyter's dark grey; text has the theme's
# colour.
BLUE, ORANGE, GREEN, PURPLE = "#3b7dd8", "#c9720a", "#2e8b57", "#9063cd"
FOREGROUND = "var(--jp-ui-font-color1, CanvasText)"
MUTED = "var(--jp-ui-font-color2, GrayText)"
LINE = "var(--jp-border-color2, #bbb)"


def size_text(num_bytes: float) -> str:
    """1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            return (
                f"{num_bytes:.0f} {unit}"
                if (unit in ("B", "MiB", "KiB") and abs(num_bytes) >= 10) or unit == "B"
                else f"{num_bytes:.1f} {unit}"
            )
        num_bytes /= 1024
    raise AssertionError


def sparkline(
    title: str,
    value: str,
    points: Sequence[float],
    color: str,
    *,
    top: float | None = None,
    width: int = 220,
    height: int = 48,
) -> str:
    """A labelled line over time; ``top`` is the scale's upper end (default: the largest point)."""
    top = max([top or 0.0, *points, 1e-9]) if top is None else max(top, 1e-9)
    step = width / max(len(points) - 1, 1)
    path = " ".join(
        f"{i * step:.1f},{height - 2 - min(p / top, 1) * (height - 6):.1f}"
        for i, p in enumerate(points)
    )
    area = (
        f'<polygon points="0,{height} {path} {(len(points) - 1) * step:.1f},{height}" '
        f'fill="{color}" opacity="0.15"/>'
        if len(points) > 1
        else ""
    )
    line = (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2" '
        'vector-effect="non-scaling-stroke"/>'
        if len(points) > 1
        else ""
    )
    return (
        f'<div style="min-width:{width}px">{_label(title, value)}'
        f'<svg role="img" viewBox="0 0 {width} {height}" preserveAspectRatio="none" '
        f'style="width:100%;height:{height}px" '
        f'aria-label="{escape(title)}: {escape(value)}">'
        f"<title>{escape(title)}: {escape(value)}</title>"
        f'<line x1="0" y1="{height - 1}" x2="{width}" y2="{height - 1}" stroke="{LINE}"/>'
        f"{area}{line}</svg></div>"
    )


def bar(
    title: str,
    value: str,
    parts: Sequence[tuple[float, str]],
    *,
    legend: Sequence[tuple[str, str]] = (),
    width: int = 220,
) -> str:
    """A horizontal bar of (share from 0 to 1, colour) parts, with an optional legend."""
    at, rects = 0.0, ""
    for share, color in parts:
        wide = max(0.0, min(share, 1 - at)) * width
        rects += f'<rect x="{at * width:.1f}" y="0" width="{wide:.1f}" height="12" fill="{color}"/>'
        at += max(0.0, min(share, 1 - at))
    return (
        f'<div style="min-width:{width}px">{_label(title, value)}'
        f'<svg role="img" viewBox="0 0 {width} 12" preserveAspectRatio="none" '
        f'style="width:100%;height:12px" aria-label="{escape(title)}: {escape(value)}">'
        f"<title>{escape(title)}: {escape(value)}</title>"
        f'<rect x="0" y="0" width="{width}" height="12" fill="{LINE}" opacity="0.5"/>'
        f"{rects}</svg>{marks(legend)}</div>"
    )


def marks(entries: Sequence[tuple[str, str]]) -> str:
    """A legend of (text, colour) entries."""
    items = (
        '<span style="white-space:nowrap">'
        f'<span aria-hidden="true" style="color:{color}">■</span> {escape(text)}</span>'
        for text, color in entries
    )
    style = f"color:{MUTED};font-size:90%;display:flex;flex-wrap:wrap;gap:0 0.8em"
    return f'<div style="{style}">{"".join(items)}</div>' if entries else ""


def _label(title: str, value: str) -> str:
    return (
        '<div style="display:flex;justify-content:space-between;gap:1em">'
        f'<span style="color:{MUTED}">{escape(title)}</span>'
        f'<span style="color:{FOREGROUND};font-variant-numeric:tabular-nums;white-space:nowrap">'
        f"{escape(value)}</span></div>"
    )


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> str:
    """A small table with a caption; ``empty`` is shown when there are no rows."""
    cell = "text-align:left;padding:0 10px 0 0"
    cells = "".join(
        "<tr>"
        + "".join(
            f'<td style="{cell};white-space:nowrap">{escape(str(value))}</td>' for value in row
        )
        + "</tr>"
        for row in rows
    )
    head = "".join(
        f'<th scope="col" style="{cell};font-weight:normal">{escape(h)}</th>' for h in heads
    )
    body = (
        f"<thead><tr>{head}</tr></thead><tbody>{cells}</tbody>"
        if rows
        else f"<tbody><tr><td>{escape(empty)}</td></tr></tbody>"
    )
    left = f"text-align:left;color:{MUTED};padding:0;white-space:nowrap"
    caption = f'<caption style="{left}">{escape(title)}</caption>'
    place = "grid-column:1/-1;justify-self:start;margin:0;font-size:inherit"
    look = f"border-collapse:collapse;font-variant-numeric:tabular-nums;color:{FOREGROUND}"
    return f'<table style="{place};{look}">{caption}{body}</table>'


def card(title: str, note: str, parts: Sequence[str]) -> str:
    """A titled frame around charts."""
    frame = f"border:1px solid {LINE};border-radius:4px;padding:8px 12px;max-width:760px"
    font = (
        f"color:{FOREGROUND};font-family:var(--jp-ui-font-family, system-ui, sans-serif);"
        "font-size:var(--jp-ui-font-size1, 13px)"
    )
    columns = "repeat(auto-fill,minmax(220px,1fr))"
    return (
        f'<div role="group" aria-label="{escape(title)}" style="{frame};{font}">'
        '<div style="display:flex;justify-content:space-between;gap:1em;margin-bottom:6px">'
        f"<strong>{escape(title)}</strong>"
        f'<span style="color:{MUTED}">{escape(note)}</span></div>'
        f'<div style="display:grid;grid-template-columns:{columns};gap:10px 24px">'
        f"{''.join(parts)}</div></div>"
    )
