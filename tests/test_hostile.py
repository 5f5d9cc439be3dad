"""Files, templates and prompts are hostile until proven otherwise."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import mutations
import pretokenizers
import pytest
import tiny_models

import llmkit
from llmkit.backend.gbnf import to_lark
from llmkit.bridge import connection as files
from llmkit.chat.template import ChatTemplate
from llmkit.errors import InvalidModelFileError, InvalidRequestError, ModelLoadError
from llmkit.files import open_plain, read_json
from llmkit.models import bert, gguf
from llmkit.schema import normalized
from llmkit.types import Message, SamplingParams

HELLO = [Message("user", "hello")]
N = "99999999999"
BOMBS = [
    *(f"{{{{ 'a'.{call} }}}}" for call in (f"ljust({N})", f"rjust({N})", f"center({N})", f"zfill({N})", f"expandtabs({N})", "translate({97: 'b' * 999})")),
    "{{ ('\\t' * 9999).expandtabs(9999999) }}",
    f"{{{{ '{{:>{N}}}'.format('x') }}}}",
    f"{{{{ '{{x:>{N}}}'.format_map({{'x': 'x'}}) }}}}",
    f"{{{{ (7).to_bytes({N}, 'big') }}}}",
    "{{ ('a' * 9999999).replace('a', 'b' * 9999) }}",
    "{{ ('a' * 9999999) | replace('a', 'b' * 9999) }}",
    "{{ ''.join(['a' * 9999999] * 200) }}",
    "{{ (['a' * 9999999] * 200) | join }}",
    "{{ ('a' * 9999999) | wordwrap(1) }}",
    "{{ range(99999) | batch(1) | list | length }}",
    "{{ range(99999) | slice(99999) | list | length }}",
    "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | list | sort | first }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "{% set l = range(99999) | list %}{% for i in l %}{% if i in l %}{% endif %}{% endfor %}",
    "{% set l = range(99999) | list %}{% for i in l %}{% if l == l[:] %}{% endif %}{% endfor %}",
    "{{ lipsum(n=99999) }}",
    "{{ ([[1]] * 9999) | sum(start=[]) }}",
    "{% set ns = namespace(t=()) %}{% for i in range(99999) %}{% set ns.t = (ns.t,) %}{% endfor %}{{ {ns.t: 1} }}",
    "{% set ns = namespace(t=()) %}{% for i in range(99999) %}{% for p in {'a': ns.t}.items() %}{% set ns.t = p %}{% endfor %}{% endfor %}{{ {ns.t: 1} }}",
    "{% set ns = namespace(t=()) %}{% macro m() %}{% set ns.t = varargs %}{% endmacro %}{% for i in range(99999) %}{{ m(ns.t) }}{% endfor %}{{ {ns.t: 1} }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
    "{% set ns = namespace(n=1) %}{% for i in range(60) %}{% set ns.n = namespace(a=ns.n, b=ns.n) %}{% endfor %}{{ [ns.n] }}",
    "{{ messages | attr('__class__') }}",
    "{{ ('x' * 9999999 ~ 'y') ~ ('x' * 9999999) ~ ('x' * 9999999) }}",
    "{{ 'a b' * 4999999 | length }}{{ ('a ' * 7999999).split() | length }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call m() %}" * 17 + "x" * 9999 + "{% endcall %}" * 17,
    "{% if true %}" * 30 + "{% endif %}" * 30,
    "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "1 + " * 5000 + "1 }}",
    "{{ " + "not " * 3000 + "1 }}",
    "{{ 2 ** 2 ** 2 ** 2 ** 2 ** 2 ** 2 }}",
    "{{ (10 ** 1200) * (10 ** 1200) }}",
    "{{ cycler('a', 'b') }}",
    "{{ joiner() }}",
    "{{ self }}{{ self.__init__ }}",
    "{% extends 'x' %}",
    "{% import 'x' as y %}",
    "\x00{{ \x00",
]


@pytest.mark.parametrize("source", BOMBS, ids=[f"{i}: {b[:50]!r}" for i, b in enumerate(BOMBS)])
def test_a_template_ends_soon_small_and_clean(source: str) -> None:
    """In a process with limits: an error of ours, or a text; and what it takes is found out when it is compiled, so that counts too."""
    code = (
        "import re, sys, resource, time\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "from llmkit.chat.template import ChatTemplate; from llmkit.errors import InvalidRequestError; from llmkit.types import Message\n"
        "t = ChatTemplate(sys.stdin.read()); began = time.process_time()\n"
        "try: t.manners; print(len(t.render([Message('user', 'hello')])))\n"
        "except InvalidRequestError as e: print('refused', e)\n"
        # not ru_maxrss, which starts at what the parent had when it forked
        "print(time.process_time() - began, re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    *_, last = done.stdout.splitlines()
    seconds, kilobytes = (float(x) for x in last.split())
    assert seconds < 30 and kilobytes < 700_000, done.stdout


LANGUAGE = [
    ("{{ m | tojson }}", '[{"role": "user", "content": "ä<b>"}]'),
    ("{{ m | tojson(ensure_ascii=True) }}", '[{"role": "user", "content": "\\u00e4<b>"}]'),
    ("{{ m[0] | tojson(separators=(',', ':'), sort_keys=True) }}", '{"content":"ä<b>","role":"user"}'),
    ("{{ m[0] | tojson(indent=2) }}", '{\n  "role": "user",\n  "content": "ä<b>"\n}'),
    ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
    ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% if x == 3 %}{% break %}{% endif %}{% endfor %}", "13"),
    ("{{ '<think>x</think>y'.split('</think>')[-1].lstrip('\\n') }}", "y"),
    ("{{ ' a '.strip() ~ 'b'.upper() ~ 'x-y'.replace('-', '_') ~ 'abc'[::-1] ~ 'abc'[1:] }}", "aBx_ycbabc"),
    ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ dict(a=1)['a'] }}{{ {'a': 1}.get('b', 2) }}", "212"),
    ("{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{{ loop.index0 }}{{ ',' if not loop.last }}{% endfor %}", "a10,b21"),
    ("{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) }}{{ f('a', y='b') }}", "[12][ab]"),
    ("{{ m | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}", "ä<b>"),
    ("{{ [3, 1, 2] | sort | first }}{{ [1, 2] | last }}{{ 'a,b' | replace(',', ';') }}{{ 'x' | indent(2, first=True) }}", "12a;b  x"),
    ("{{ x is defined }}{{ m is sequence and m is iterable and m is not string and m[0] is mapping }}{{ none is none }}", "FalseTrueTrue"),
    ("{{ '%s' is string }}{{ 5 is number }}{{ 'a' in 'abc' }}{{ 'user' in m[0].values() }}", "TrueTrueTrueTrue"),
    ("{{ '{} and {x}'.format('a', x='b') }}", "a and b"),
    ("{%- if true -%} a {%- endif -%} b", "ab"),
    ("{{ strftime_now('%Y') | length }}", "4"),
]


@pytest.mark.parametrize(("source", "expected"), LANGUAGE)
def test_what_templates_of_models_use_is_there(source: str, expected: str) -> None:
    template = ChatTemplate(source.replace("m[", "messages[").replace("{{ m ", "{{ messages ").replace("m is", "messages is"))
    assert template._run([{"role": "user", "content": "ä<b>"}], True, (), {}) == expected


# -- prompts


def test_every_pre_tokenizer_takes_every_pattern() -> None:
    """12,000 characters here; `python tests/pretokenizers.py 260000` is the whole of it."""
    assert (
        pretokenizers.scan(12_000, ["default", "deepseek-llm", "deepseek-v3", "gpt-4o", "tekken", "falcon", "bloom", "seed-coder", "superbpe", "jais-2"]) == {}
    )


# -- model files


@pytest.mark.model
def test_a_file_that_ends_a_process_ends_a_child(tmp_path: Path) -> None:
    found = mutations.run(60, tmp_path / "cache", seed=3)
    assert "died" not in found and "unclean" not in found, found
    assert sum(map(len, found.values())) == 60 and len(found["refused"]) > 20 and found.get("works")


@pytest.mark.model
def test_a_known_file_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit import probing

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs: list[Path] = []
    run = probing._run
    monkeypatch.setattr(probing, "_run", lambda path, *more: (runs.append(path), run(path, *more))[1])
    file = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    for _ in range(2):
        llmkit.load(file, n_ctx=64, n_slots=1, share=False).unload()
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    llmkit.load(copy, n_ctx=64, n_slots=1, share=False).unload()
    assert runs == [file], "the same content under another name is known"
    data = bytearray(file.read_bytes())
    at = data.find(b"llama.block_count") + len(b"llama.block_count") + 4
    data[at : at + 4] = struct.pack("<I", 0)
    copy.write_bytes(data)
    with pytest.raises(ModelLoadError):
        llmkit.load(copy, n_ctx=64, n_slots=1, share=False)
    with pytest.raises(ModelLoadError):
        llmkit.load(copy, n_ctx=64, n_slots=1, share=False)
    assert len(runs) == 3, "what did not survive is not remembered as fine"


@pytest.mark.model
def test_the_stop_button_ends_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    from llmkit.probing import probe

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def press() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(tiny_models.write_large(tmp_path / "large.gguf"), on_wait=press)
    assert not [c for c in psutil.Process().children() if "probing" in " ".join(c.cmdline())]


@pytest.mark.model
def test_adapters_that_are_none(tmp_path: Path) -> None:
    tiny, lora = tiny_models.write(tmp_path / "tiny.gguf", "llama"), tiny_models.write_lora(tmp_path / "lora.gguf")
    good = lora.read_bytes()
    for old, new in ((b"adapter.type", b"adapter.tipe"), (b"general.type", b"general.tipe"), (b"lora", b"loco"), (b"lora_a", b"lora_c"), (b"llama", b"mamba")):
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(good.replace(old, new))
        try:
            llmkit.load(tiny, n_ctx=64, n_slots=1, share=False, lora=bad).unload()
        except ModelLoadError:
            pass
    with pytest.raises(ModelLoadError, match=r"adapter|LoRA"):
        llmkit.load(tiny, n_ctx=64, n_slots=1, share=False, lora=tiny)
    bad.write_bytes(good[:300])
    with pytest.raises(ModelLoadError):
        llmkit.load(tiny, n_ctx=64, n_slots=1, share=False, lora=bad)


def test_a_sparse_header_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 30_000_000))
        file.truncate(1 << 30)
    began = time.process_time()
    with pytest.raises(InvalidModelFileError, match="claims"):
        gguf.read_header(path)
    assert time.process_time() - began < 3
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 9, 3) + b"\0" * 100)
    with pytest.raises(InvalidModelFileError, match="type 9"):
        gguf.read_header(path)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    folder = Path(__file__).parent / "cases" / "split"
    for part in (1, 3):
        assert llmkit.estimate(folder / f"pocket-0000{part}-of-00003.gguf").weights_bytes == 95_360
    here = tmp_path / "linked"
    here.mkdir()
    for file in folder.glob("*.gguf"):
        (here / file.name).symlink_to(file)
    assert llmkit.estimate(here / "pocket-00002-of-00003.gguf").weights_bytes == 95_360, "as the hub's cache has them"
    (here / "pocket-00002-of-00003.gguf").unlink()
    with pytest.raises(InvalidModelFileError, match=r"pocket-00002-of-00003\.gguf is missing"):
        llmkit.estimate(here / "pocket-00001-of-00003.gguf")
    (tmp_path / "renamed.gguf").write_bytes((folder / "pocket-00001-of-00003.gguf").read_bytes())
    with pytest.raises(InvalidModelFileError, match="one of 3 files"):
        llmkit.estimate(tmp_path / "renamed.gguf")


@pytest.mark.parametrize("config", [b"[" * 100_000, b"\xff", b"null", b'{"architectures": 5}', b'{"architectures": ["BertModel"], "hidden_act": []}', b""])
def test_a_damaged_folder_is_our_error(tmp_path: Path, config: bytes) -> None:
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InvalidModelFileError):
        bert.convert(tmp_path, tmp_path / "out.gguf")


# -- folders of others


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
def test_pipes_and_links_hold_nobody_up(tmp_path: Path, private_runtime: Path) -> None:
    os.mkfifo(private_runtime / "llmkit-x.json", 0o600)
    (private_runtime / "llmkit-y.json").symlink_to("/dev/zero")
    (private_runtime / "llmkit-z.json").mkdir()
    assert files.find_connections() == []
    with pytest.raises(OSError):
        open_plain(private_runtime / "llmkit-x.json")
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(InvalidModelFileError):
        gguf.read_header(tmp_path / "model.gguf")
    with pytest.raises(ValueError):
        (tmp_path / "deep.json").write_text("[" * 100_000)
        read_json(tmp_path / "deep.json", 1 << 20)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
def test_a_prefix_folder_deletes_nothing_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "Downloads"
    folder.mkdir(mode=0o700)
    others = [folder / "film.mkv.part", folder / "photos.kv", folder / "0123456789abcdef-new.part"]
    for file in others:
        file.write_bytes(b"x" * 5000)
    stale = folder / "0123456789abcdef-old.part"
    stale.write_bytes(b"x")
    os.utime(stale, (1, 1))
    tiny = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    with llmkit.load(tiny, n_ctx=128, n_slots=1, share=False, prefix_dir=folder, disk_cache_mb=1) as llm:
        mark = llm.engine._runner._store._fingerprint  # type: ignore[attr-defined]
        llm.save_prefix("some words that are worth keeping " * 2)
    assert all(file.exists() for file in others) and not stale.exists()
    os.mkfifo(folder / f"{mark}-{'0' * 24}.kv")
    (folder / f"{mark}-{'1' * 24}.kv").write_text("[" * 100_000)
    with pytest.warns(RuntimeWarning, match="passing over"), llmkit.load(tiny, n_ctx=128, n_slots=1, share=False, prefix_dir=folder) as llm:
        assert llm.generate("a", max_tokens=1, ignore_eos=True).usage.completion_tokens == 1


# -- grammars and schemas


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "#"}, "no finite text"),
        ({"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}}, "no finite text"),
        ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "no finite text"),
        ({"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"$ref": "#/$defs/y"}, "y": {"$ref": "#/$defs/x"}}}, "no finite text"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems at #"),
        ({"properties": {"a": {"items": [{"not": {"type": "null"}}]}}}, "not at #/properties/a/items/0"),
        ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "if at #"),
        ({"$ref": "https://example.org/schema"}, r"\$ref at #"),
        ({"properties": {"a": {"type": "strange"}}}, "type at #/properties/a"),
        ({"propertyNames": {"pattern": "^a"}}, "propertyNames at #"),
        (False, "a schema is an object"),
        ([], "a schema is an object"),
        ({"properties": {"a": 5}}, "#/properties/a"),
        ({"minimum": 5, "maximum": 4}, "minimum at #"),
    ],
)
def test_schemas_that_cannot_be_held(schema: object, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        normalized(schema)


@pytest.mark.parametrize(
    ("schema", "held"),
    [
        ({"type": "string", "format": "uuid4", "title": "x"}, {"type": "string", "title": "x"}),
        ({"type": "object", "propertyNames": {"type": "string"}, "minProperties": 0}, {"type": "object"}),
        ({"type": "array", "uniqueItems": False, "minItems": 0}, {"type": "array"}),
        ({"type": "integer", "uniqueItems": True, "minimum": 0, "exclusiveMinimum": True}, {"type": "integer", "exclusiveMinimum": 0}),
        ({"type": "integer", "maximum": 9, "exclusiveMaximum": False}, {"type": "integer", "maximum": 9}),
        ({"type": "integer", "minimum": -(2**63)}, {"type": "integer", "minimum": -9223372036854774784}),
        ({"type": "number", "maximum": 1.7976931348623157e308}, {"type": "number"}),
        ({"not": False, "then": {"type": "null"}, "$schema": "http://json-schema.org/draft-07/schema#"}, {}),
        ({"type": "string", "maxLength": 8.0}, {"type": "string", "maxLength": 8}),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, {"anyOf": [{"type": "null"}, {"$ref": "#"}]}),
        ({"const": {"not": 1, "uniqueItems": True}}, {"const": {"not": 1, "uniqueItems": True}}),
        ({"properties": {"not": {"type": "string"}, "if": {}}}, {"properties": {"not": {"type": "string"}, "if": {}}}),
    ],
)
def test_keywords_that_ask_nothing_are_no_errors(schema: object, held: object) -> None:
    assert normalized(schema) == held


def test_a_long_chain_of_references_is_read_soon() -> None:
    chain = {f"d{i}": {"type": "object", "properties": {"next": {"$ref": f"#/$defs/d{i + 1}"}}, "required": ["next"]} for i in range(2000)}
    began = time.process_time()
    assert normalized({"$ref": "#/$defs/d0", "$defs": {**chain, "d2000": {"type": "null"}}})
    with pytest.raises(InvalidRequestError):
        normalized({"$ref": "#/$defs/d0", "$defs": {**chain, "d2000": {"$ref": "#/$defs/d0"}}})
    assert time.process_time() - began < 5


GBNF = [
    ("escapes", 'root ::= "caf\\u00e9" | "\\x41" | "\\U0001F600"', ["café", "A", "😀"], ["cafe", "B"]),
    ("classes", "root ::= [\\U0001F600-\\U0001F64F] [^a-c] [a&&b]", ["😀x&", "😁d" + "a"], ["ax&", "😀aa"]),
    ("names", 'root ::= start 1x foo-bar Foo foo\nstart ::= "s"\n1x ::= "1"\nfoo-bar ::= "-"\nFoo ::= "F"\nfoo ::= "f"', ["s1-Ff"], ["s1-ff"]),
    ("not greedy", 'root ::= w "z"\nw ::= [a-z]+', ["abz"], ["ab", "z"]),
    ("words that share beginnings", 'root ::= ("a" | "ab") "b"', ["ab", "abb"], ["b"]),
    ("repeats", 'root ::= "a"{2}{3} "b"? "c"{0} "d"{1,2} ("e" | "f"){2,}', ["aaaaaadee", "aaaaaabddef"], ["aaaaadee", "aaaaaade"]),
    ("any", "root ::= . .", ["\n\n", "é😀"], ["a"]),
    ("recursion", 'root ::= "(" root ")" | "x"', ["x", "((x))"], ["(x", "()"]),
    ("left recursion", 'root ::= root "a" | "b"', ["b", "baa"], ["a"]),
    ("comments and lines", '# one\nroot ::= ( # two\n "a" |\n "b"\n)+ # three\r\n', ["abba"], ["c"]),
    ("dead cases", 'root ::= "a" | dead\ndead ::= "b" dead', ["a"], ["b"]),
]


@pytest.mark.model
@pytest.mark.parametrize(("text", "fits", "others"), [case[1:] for case in GBNF], ids=[case[0] for case in GBNF])
def test_gbnf_is_read_as_llama_cpp_does(engine, text: str, fits: list[str], others: list[str]) -> None:  # type: ignore[no-untyped-def]
    from llmkit.types import Grammar

    def accepts(said: str) -> bool:
        constraint = engine._grammars.compile(Grammar("gbnf", text))
        for token in engine._vocab.tokenize(said, add_special=False):
            if not constraint.allows(token):
                return False
            constraint.accept(token)
        return bool(constraint.allows(engine._vocab.eos))

    assert all(map(accepts, fits)) and not any(map(accepts, others))


@pytest.mark.parametrize(
    "text", ["root ::= root", 'root ::= "a" root', "root ::= x\nx ::= y\ny ::= x", 'x ::= "a"', "root ::= [", 'root ::= "a', "root ::= (a", "root ::= b"]
)
def test_gbnf_that_is_none(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        to_lark(text)


@pytest.mark.model
def test_a_grammar_that_costs_too_much_is_refused(engine) -> None:  # type: ignore[no-untyped-def]
    from llmkit.types import GenerationRequest, Grammar

    for kind, text in (
        ("gbnf", "root ::= " + " | ".join(f'"w{i:05}" root | "w{i:05}"' for i in range(3000))),
        ("regex", "(a?)" * 20_000),
        ("lark", "start: " + " | ".join(f'"w{i}" x' for i in range(4000)) + '\nx: "a"'),
    ):
        began = time.monotonic()
        with pytest.raises(InvalidRequestError):
            engine.submit(GenerationRequest("r", SamplingParams(grammar=Grammar(kind, text)), prompt="a"))
        assert time.monotonic() - began < 20
    many = Grammar("gbnf", "root ::= " + " | ".join(f'"w{i:05}"' for i in range(6000)))
    text = engine.submit(GenerationRequest("r2", SamplingParams(grammar=many, max_tokens=12), prompt="a")).result(60).text
    assert text.startswith("w") and len(text) == 6, "thousands of plain texts are fine"
