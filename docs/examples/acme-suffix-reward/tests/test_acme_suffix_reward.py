import pytest
from miles_core.testing.fakes import make_sample

from acme_suffix_reward import options
from acme_suffix_reward.reward import AcmeSuffixReward


@pytest.mark.parametrize(
    ("text", "score"),
    [("The answer is Four", 1.0), ("four", 1.0), ("Four it is", 0.25), ("five", 0.0), ("", 0.0)],
)
def test_the_answer_counts_more_at_the_end(text: str, score: float) -> None:
    reward = AcmeSuffixReward(options.AcmeSuffixReward(inside=0.25))
    assert reward.score([make_sample(text, answer="four")]) == [score]


def test_case_counts_if_asked_for() -> None:
    reward = AcmeSuffixReward(options.AcmeSuffixReward(ignore_case=False))
    assert reward.score([make_sample("Four", answer="four")]) == [0.0]


def test_without_an_answer_nothing_is_right() -> None:
    reward = AcmeSuffixReward(options.AcmeSuffixReward())
    assert reward.score([make_sample("four", answer=None), make_sample("four", answer="")]) == [0.0, 0.0]


def test_a_score_beyond_the_right_one_is_refused() -> None:
    with pytest.raises(ValueError, match="inside must be in"):
        options.AcmeSuffixReward(inside=1.5)
