"""The rewards, each against cases worked out by hand or against the library that it stands for."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.sample import Sample
from miles_rewards import miles_data_sources, miles_rewards, options
from miles_rewards.exact import Exact
from miles_rewards.length import LengthPenalty
from miles_rewards.math import MathVerify
from miles_rewards.number import Number, last_boxed, last_number


def sample(text: str = "", answer: str | None = None, *, tokens: int = 1, tools: int = 0) -> Sample:
    size = tokens + tools
    return Sample(
        group=4,
        index=0,
        prompt=np.ones(1, np.int32),
        response=np.ones(size, np.int32),
        mask=np.arange(size) < tokens,
        logprobs=np.zeros(size, np.float32),
        versions=np.zeros(size, np.int32),
        status="completed",
        text=text,
        answer=answer,
    )


@pytest.mark.parametrize(
    ("settings", "text", "answer", "score"),
    [
        ({}, " 42\n", "42", 1),
        ({}, "a  b", "a b", 1),
        ({}, "Yes", "yes", 0),
        ({"ignore_case": True}, "Yes", "yES", 1),
        ({"ignore_spaces": False}, "42 ", "42", 0),
        ({"pattern": r"#### (.+)"}, "so #### 1\nno, #### 42", "42", 1),
        ({"pattern": r"#### (.+)"}, "42", "42", 0),
        ({"pattern": r"[A-D]\b"}, "It is not B. It is C", "C", 1),
    ],
)
def test_exact(settings: dict[str, object], text: str, answer: str, score: float) -> None:
    assert Exact(options.Exact(**settings)).score([sample(text, answer)]) == [score]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 42.", 42),
        ("first 3, then 1,234,567.50", Fraction("1234567.5")),
        ("the answer is -5", -5),
        ("= - 5", -5),
        ("x = −5", -5),
        ("12 - 5", 5),
        ("12-5", 5),
        ("(3) - 5", 5),
        ("it costs $-7", -7),
        ("-$1,000", -1000),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac34", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        ("1.5e-3", Fraction(3, 2000)),
        ("5 km2", 5),
        ("25%", 25),
        (".5", Fraction(1, 2)),
        ("1, 2, 3", 3),
        ("1,2345", 2345),
        ("none at all", None),
        ("1/0", None),
        ("9" * 500, None),
        ("1e99999999999", None),
        ("1e5000", None),
    ],
)
def test_the_last_number_of_a_text(text: str, value: Fraction | int | None) -> None:
    assert last_number(text) == value


@given(st.fractions(), st.text("abc =:.,", max_size=5))
def test_any_fraction_is_read_back_from_prose(value: Fraction, prose: str) -> None:
    assert last_number(f"{prose} = {value}") == value


@given(st.integers(), st.integers(0, 6))
def test_any_decimal_is_read_back_with_separators(units: int, places: int) -> None:
    value = Fraction(units, 10**places)
    sign, digits = "-" if units < 0 else "", str(abs(units)).rjust(places + 1, "0")
    whole, decimals = (digits[:-places], "." + digits[-places:]) if places else (digits, "")
    assert last_number(f"It is {sign}{int(whole):,}{decimals}.") == value


@given(st.text())
def test_no_text_breaks_the_reading_of_numbers(text: str) -> None:
    last_number(text)
    last_boxed(text)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{4} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} and then \boxed{8", "7"),
        ("nothing", None),
    ],
)
def test_the_last_complete_box(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("settings", "text", "answer", "score"),
    [
        ({}, r"\boxed{12} because 3", "12", 1),
        ({"where": "last"}, r"\boxed{12} because 3", "12", 0),
        ({"where": "boxed"}, "12", "12", 0),
        ({}, "no number", "12", 0),
        ({}, "0.5", r"\frac12", 1),
        ({}, "3.1416", "3.14159265", 0),
        ({"tolerance": 1e-4}, "3.1416", "3.14159265", 1),
        ({}, "1000000", "#### 1,000,000", 1),
    ],
)
def test_number(settings: dict[str, object], text: str, answer: str, score: float) -> None:
    assert Number(options.Number(**settings)).score([sample(text, answer)]) == [score]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        (r"so $x = \frac{1}{2}$", "0.5", 1),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1),
        (r"\boxed{\{1, 2\}}", r"$\{2, 1\}$", 1),
        (r"\boxed{3}", "4", 0),
        ("I do not know", "4", 0),
        ("The answer is 1,234", "1234", 1),
    ],
)
def test_math_verify(text: str, answer: str, score: float) -> None:
    assert MathVerify(options.MathVerify()).score([sample(text, answer)]) == [score]


def test_math_verify_gives_up_on_an_expression_that_takes_for_ever() -> None:
    tower = r"\boxed{" + "9^{" * 12 + "9" + "}" * 12 + "}"
    assert MathVerify(options.MathVerify(limit_s=1)).score([sample(tower, "4")]) == [0.0]


@pytest.mark.parametrize("reward", [Exact(options.Exact()), Number(options.Number()), MathVerify(options.MathVerify())])
def test_a_sample_without_reference_answer_is_an_error(reward: Exact | Number | MathVerify) -> None:
    with pytest.raises(ValueError, match="prompt 4 has no reference answer"):
        reward.score([sample("4")])


@given(st.integers(1, 300), st.integers(0, 50))
def test_length_penalty_is_the_equation_of_dapo(tokens: int, tools: int) -> None:
    longest, cache = 200, 60
    (score,) = LengthPenalty(options.LengthPenalty(max_tokens=longest, cache=cache)).score(
        [sample(tokens=tokens, tools=tools)]
    )
    if tokens <= longest - cache:
        expected = 0.0
    elif tokens <= longest:
        expected = ((longest - cache) - tokens) / cache
    else:
        expected = -1.0
    assert math.isclose(score, expected)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: options.Exact(pattern="("), "not a regular expression"),
        (lambda: options.Number(tolerance=-1.0), r"tolerance must be in \[0, 1\)"),
        (lambda: options.MathVerify(limit_s=0), "limit_s must be at least 1"),
        (lambda: options.LengthPenalty(max_tokens=5, cache=6), "cache must be between 1 and max_tokens"),
        (lambda: options.GymData(task="x", prompt="Q"), "prompt must contain"),
        (lambda: options.GymData(task="x", holdout=1.0), "holdout must be between 0 and 1"),
    ],
)
def test_impossible_options_are_refused(make: object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make()  # type: ignore[operator]


def test_every_record_leads_to_what_it_names() -> None:
    from pkgutil import resolve_name

    for spec in [*miles_rewards(), *miles_data_sources()]:
        assert spec.options is not None
        assert isinstance(resolve_name(spec.ref), type)
        assert isinstance(resolve_name(spec.options), type)


def test_the_plugin_imports_nothing_heavy() -> None:
    script = (
        "import sys, miles_rewards, miles_rewards.options; "
        "assert not {'torch', 'numpy', 'ray', 'transformers', 'sympy', 'reasoning_gym'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
