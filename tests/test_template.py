import pytest

from llmkit.chat.template import CHATML, ChatTemplate
from llmkit.errors import InvalidRequestError
from llmkit.protocol import Message

HELLO = [Message("user", "hello")]


def test_chatml() -> None:
    assert (
        ChatTemplate(CHATML).render(HELLO)
        == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_and_helpers() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ messages | tojson }}{{ eos_token }}", bos="<s>", eos="</s>"
    )
    assert template.render(HELLO) == '<s>[{"role": "user", "content": "hello"}]</s>'
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(HELLO).startswith("20")


def test_a_refusal_is_an_error_that_quotes_it() -> None:
    with pytest.raises(InvalidRequestError, match="must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ().__class__.__base__ }}",
        "{% set x = messages.append(1) %}",
        "{{ '%s' | format(self.__init__.__globals__) }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ 'x' * 100000000 }}",
        "{{ 1 / 0 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        (
            "{% set l = range(99999) | list %}{% for i in l %}{% for j in l %}"
            "{% if false %}x{% endif %}{% endfor %}{% endfor %}"
        ),
        (
            "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
            "{{ m(60) }}"
        ),
        "{{ ('a' * 200000000) | length }}",
        "{{ 10 ** 99999999 }}",
        "{% set __turn__ = namespace() %}",
        (
            "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
            "{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
        ),
        (
            "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
            "{% set ns.s = ns.s + ns.s %}{% endfor %}"
        ),
        "{{ '%999999999d' % 1 }}",
        "{{ 'x' | center(999999999) }}",
        "{% include '/etc/passwd' %}",
        "{% if %}",
        "{{ messages[99].content.nope }}",
    ],
)
def test_a_template_cannot_reach_python_or_run_wild(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source).render(HELLO)


def test_an_unsafe_attribute_is_undefined() -> None:
    assert (
        ChatTemplate("[{{ raise_exception.__globals__ }}{{ messages.__class__ }}]").render(HELLO)
        == "[]"
    )


def test_bad_messages() -> None:
    with pytest.raises(InvalidRequestError, match="at least one"):
        ChatTemplate(CHATML).render([])
    with pytest.raises(InvalidRequestError, match="role"):
        ChatTemplate(CHATML).render([Message("wizard", "x")])
