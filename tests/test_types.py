import pytest

from llmkit.errors import InvalidRequestError
from llmkit.protocol import (
    Completion,
    FinishReason,
    GenerationRequest,
    Message,
    RequestMetrics,
    SamplingParams,
    Usage,
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", -1),
        ("typical_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 1e9),
        ("frequency_penalty", float("inf")),
        ("penalty_last_n", -1),
        ("seed", 2**70),
        ("stop", ("",)),
        ("stop", ("a",) * 17),
        ("stop", (1,)),
        ("logit_bias", ((-1, 0.0),)),
        ("logit_bias", ((1, float("nan")),)),
        ("ignore_eos", "yes"),
    ],
)
def test_a_parameter_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=name) as raised:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert raised.value.param == name


def test_friendly_forms_are_normalised() -> None:
    params = SamplingParams(stop="END", logit_bias={5: -1.0}, seed=-1)  # type: ignore[arg-type]
    assert params.stop == ("END",)
    assert params.logit_bias == ((5, -1.0),)
    assert params.seed is not None and 0 <= params.seed < 2**32 - 1


def test_only_what_differs_travels() -> None:
    assert SamplingParams().as_dict() == {}
    assert SamplingParams(temperature=0, stop=("x",)).as_dict() == {
        "temperature": 0,
        "stop": ("x",),
    }


def test_plain_greedy_needs_untouched_logits() -> None:
    assert SamplingParams(temperature=0).plain_greedy
    assert SamplingParams(top_k=1).plain_greedy
    assert SamplingParams(temperature=0, ignore_eos=True).plain_greedy
    assert not SamplingParams(temperature=0, repetition_penalty=1.1).plain_greedy
    assert not SamplingParams(temperature=0, logit_bias=((1, 1.0),)).plain_greedy


def test_a_request_has_a_prompt_or_messages() -> None:
    with pytest.raises(InvalidRequestError):
        GenerationRequest("a")
    with pytest.raises(InvalidRequestError):
        GenerationRequest("a", prompt="x", messages=(Message("user", "x"),))


def test_completion_rates_and_repr() -> None:
    c = Completion(
        "hi",
        FinishReason.STOP,
        Usage(10, 5, 2),
        RequestMetrics(queue_s=0.5, ttft_s=1.5, decode_s=2.0),
    )
    assert c.decode_tok_s == 2.0
    assert (
        repr(c) == "Completion('hi', finish_reason='stop', prompt_tokens=10, completion_tokens=5)"
    )
    assert Completion("hi", FinishReason.STOP) == Completion(
        "hi", FinishReason.STOP, metrics=RequestMetrics(1, 1, 1, 1)
    )
