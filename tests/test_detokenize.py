from llmkit.engine.detokenize import Detokenizer


def pieces(*parts: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(parts.__getitem__, stop)
    return [detokenizer.push(i) for i in range(len(parts))], detokenizer


def test_a_code_point_is_never_split() -> None:
    texts, d = pieces(b"a\xf0\x9f", b"\x98", b"\x80b")
    assert texts == ["a", "", "😀b"]
    assert d.flush() == ""


def test_an_unfinished_code_point_ends_as_replacement() -> None:
    texts, d = pieces(b"a", b"\xf0\x9f")
    assert texts == ["a", ""]
    assert d.flush() == "\ufffd"


def test_a_stop_string_over_tokens_never_leaks() -> None:
    texts, d = pieces(b"one ", b"<", b"EN", b"D", b"> two", stop=("<END>",))
    assert "".join(texts) == "one "
    assert d.stopped and d.flush() == ""


def test_what_only_looked_like_a_stop_string_is_given_out() -> None:
    texts, d = pieces(b"a<E", b"X", b"<EN", stop=("<END>",))
    assert texts == ["a", "<EX", ""]
    assert d.flush() == "<EN"


def test_the_earliest_of_several_stop_strings_wins() -> None:
    texts, d = pieces(b"abc", b"XY", stop=("Y", "bcX"))
    assert "".join(texts) == "a" and d.stopped


def test_a_stop_string_completed_by_flush() -> None:
    _, d = pieces(b"ab\xc3", stop=("\ufffd",))
    assert d.flush() == "" and d.stopped


def test_streamed_equals_whole() -> None:
    data = "naïve 😀 text — with ümläuts".encode()
    texts, d = pieces(*[data[i : i + 1] for i in range(len(data))], stop=("never",))
    assert "".join(texts) + d.flush() == data.decode()
