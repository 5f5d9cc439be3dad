"""Hostile templates and prompts."""

from __future__ import annotations

import subprocess
import sys

import pretokenizers
import pytest

from llmkit.chat.template import ChatTemplate
from llmkit.protocol import Message

HELLO = [Message("user", "hello")]


N = "99999999999"


BOMBS = [
    *(
        f"{{{{ 'a'.{call} }}}}"
        for call in (
            f"ljust({N})",
            f"rjust({N})",
            f"center({N})",
            f"zfill({N})",
            f"expandtabs({N})",
            "translate({97: 'b' * 999})",
        )
    ),
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
    (
        "{% set ns = namespace(t=()) %}{% for i in range(99999) %}{% set ns.t = (ns.t,) %}"
        "{% endfor %}{{ {ns.t: 1} }}"
    ),
    (
        "{% set ns = namespace(t=()) %}{% for i in range(99999) %}"
        "{% for p in {'a': ns.t}.items() %}{% set ns.t = p %}{% endfor %}{% endfor %}"
        "{{ {ns.t: 1} }}"
    ),
    (
        "{% set ns = namespace(t=()) %}{% macro m() %}{% set ns.t = varargs %}{% endmacro %}"
        "{% for i in range(99999) %}{{ m(ns.t) }}{% endfor %}{{ {ns.t: 1} }}"
    ),
    (
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}"
        "{% endfor %}{{ ns.l }}"
    ),
    (
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}"
        "{% endfor %}{{ ns.l | tojson }}"
    ),
    (
        "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
        "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
    ),
    (
        "{% set ns = namespace(n=1) %}{% for i in range(60) %}"
        "{% set ns.n = namespace(a=ns.n, b=ns.n) %}{% endfor %}{{ [ns.n] }}"
    ),
    "{{ messages | attr('__class__') }}",
    "{{ ('x' * 9999999 ~ 'y') ~ ('x' * 9999999) ~ ('x' * 9999999) }}",
    "{{ 'a b' * 4999999 | length }}{{ ('a ' * 7999999).split() | length }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 17
    + "x" * 9999
    + "{% endcall %}" * 17,
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
    """In a process with limits: an error of ours, or a text; and what it takes is found out when it
    is compiled, so that counts too."""
    code = (
        "import re, sys, resource, time\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); "
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "from llmkit.chat.template import ChatTemplate; "
        "from llmkit.errors import InvalidRequestError; from llmkit.protocol import Message\n"
        "t = ChatTemplate(sys.stdin.read()); began = time.process_time()\n"
        "try: t.manners; print(len(t.render([Message('user', 'hello')])))\n"
        "except InvalidRequestError as e: print('refused', e)\n"
        # not ru_maxrss, which starts at what the parent had when it forked
        "print(time.process_time() - began, re.search(r'VmHWM:\\s+(\\d+)', "
        "open('/proc/self/status').read())[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    *_, last = done.stdout.splitlines()
    seconds, kilobytes = (float(x) for x in last.split())
    assert seconds < 30 and kilobytes < 700_000, done.stdout


LANGUAGE = [
    ("{{ m | tojson }}", '[{"role": "user", "content": "ä<b>"}]'),
    ("{{ m | tojson(ensure_ascii=True) }}", '[{"role": "user", "content": "\\u00e4<b>"}]'),
    (
        "{{ m[0] | tojson(separators=(',', ':'), sort_keys=True) }}",
        '{"content":"ä<b>","role":"user"}',
    ),
    ("{{ m[0] | tojson(indent=2) }}", '{\n  "role": "user",\n  "content": "ä<b>"\n}'),
    ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
    (
        (
            "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}"
            "{% if x == 3 %}{% break %}{% endif %}{% endfor %}"
        ),
        "13",
    ),
    ("{{ '<think>x</think>y'.split('</think>')[-1].lstrip('\\n') }}", "y"),
    (
        "{{ ' a '.strip() ~ 'b'.upper() ~ 'x-y'.replace('-', '_') ~ 'abc'[::-1] ~ 'abc'[1:] }}",
        "aBx_ycbabc",
    ),
    (
        (
            "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ dict(a=1)['a'] }}"
            "{{ {'a': 1}.get('b', 2) }}"
        ),
        "212",
    ),
    (
        (
            "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{{ loop.index0 }}"
            "{{ ',' if not loop.last }}{% endfor %}"
        ),
        "a10,b21",
    ),
    (
        "{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) }}{{ f('a', y='b') }}",
        "[12][ab]",
    ),
    (
        "{{ m | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}",
        "ä<b>",
    ),
    (
        (
            "{{ [3, 1, 2] | sort | first }}{{ [1, 2] | last }}"
            "{{ 'a,b' | replace(',', ';') }}{{ 'x' | indent(2, first=True) }}"
        ),
        "12a;b  x",
    ),
    (
        (
            "{{ x is defined }}"
            "{{ m is sequence and m is iterable and m is not string and m[0] is mapping }}"
            "{{ none is none }}"
        ),
        "FalseTrueTrue",
    ),
    (
        "{{ '%s' is string }}{{ 5 is number }}{{ 'a' in 'abc' }}{{ 'user' in m[0].values() }}",
        "TrueTrueTrueTrue",
    ),
    ("{{ '{} and {x}'.format('a', x='b') }}", "a and b"),
    ("{%- if true -%} a {%- endif -%} b", "ab"),
    ("{{ strftime_now('%Y') | length }}", "4"),
]


@pytest.mark.parametrize(("source", "expected"), LANGUAGE)
def test_what_templates_of_models_use_is_there(source: str, expected: str) -> None:
    template = ChatTemplate(
        source.replace("m[", "messages[")
        .replace("{{ m ", "{{ messages ")
        .replace("m is", "messages is")
    )
    assert template._run([{"role": "user", "content": "ä<b>"}], True, (), {}) == expected


def test_pre_tokenizers_take_every_pattern() -> None:
    """Some of them, and 6,000 characters; `python tests/pretokenizers.py 260000` is all of it."""
    assert pretokenizers.scan(6_000, ["default", "deepseek-v3", "tekken", "superbpe"]) == {}
