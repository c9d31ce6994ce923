from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

from miles_core import AdvantageSpec
from miles_core.config.schema import Component
from miles_core.errors import RunError
from miles_core.run.advantages import apply_advantage
from miles_core.sample import Batch

BEHAVIOURS = {
    "spread": lambda inputs: {"advantages": np.where(inputs.mask, inputs.rewards[inputs.segment_ids], 0.0)},
    "unmasked": lambda inputs: {"advantages": inputs.rewards[inputs.segment_ids] + 1},
    "short": lambda inputs: {"advantages": np.zeros(2)},
    "infinite": lambda inputs: {"advantages": np.where(inputs.mask, np.inf, 0.0)},
    "other": lambda inputs: {"returns": np.zeros(len(inputs.mask))},
    "raises": lambda inputs: 1 / 0,
    "values": lambda inputs: {"advantages": inputs.columns["values"] * 2},
}


def advantage(inputs, options):
    """The plugin's function, found by its reference; `options` says how it behaves."""
    return BEHAVIOURS[options](inputs)


def component(behaviour: str, **traits) -> Component[AdvantageSpec]:
    spec = AdvantageSpec(name="fake", ref="fake_advantages:advantage", summary="a fake", **traits)
    return Component(spec=spec, plugin="miles-fake", options=behaviour)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """A module of a name that a reference can have."""
    module = ModuleType("fake_advantages")
    vars(module)["advantage"] = advantage
    monkeypatch.setitem(sys.modules, "fake_advantages", module)


def batch(rewards=(1.0, 2.0)) -> Batch:
    mask = np.array([False, True, False, True, True])
    return Batch(
        cu_seqlens=np.array([0, 2, 5]),
        columns={"mask": mask, "tokens": np.arange(5), "values": np.where(mask, np.arange(5.0), 0)},
        samples={"reward": np.array(rewards), "group": np.array([40, 41]), "index": np.array([0, 3])},
    )


def test_the_given_columns_join_the_batch():
    got = apply_advantage(batch(), component("spread"))
    np.testing.assert_array_equal(got["advantages"], [0, 1, 0, 2, 2])
    assert got["advantages"].dtype == np.float64


def test_without_an_advantage_the_batch_stays_as_it_is():
    original = batch()
    assert apply_advantage(original, None) is original


def test_needed_columns_are_handed_over():
    got = apply_advantage(batch(), component("values", needs=frozenset({"values"})))
    np.testing.assert_array_equal(got["advantages"], [0, 2, 0, 6, 8])


def test_samples_that_could_not_be_scored_are_kept_from_the_advantage():
    unscored = batch((1.0, np.nan)).with_samples(scored=np.array([True, False]))
    np.testing.assert_array_equal(apply_advantage(unscored, component("spread"))["advantages"], [0, 1, 0, 0, 0])


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_names_its_sample(reward):
    with pytest.raises(RunError, match=r"sample 41/3 has reward -?(nan|inf)"):
        apply_advantage(batch((1.0, reward)), component("spread"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_column_that_is_not_finite_names_its_token(value):
    spoiled = np.array([value, 1.0, value, value, 4.0])  # the first two are masked
    reads = component("values", needs=frozenset({"values"}))
    with pytest.raises(RunError, match=r"values is -?(nan|inf) at token 1 of sample 41/3: not finite"):
        apply_advantage(batch().with_columns(values=spoiled), reads)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("unmasked", r"advantages of .*'fake' of miles-fake is 2.0 at token 0 of sample 40/0: not 0 where masked"),
        ("short", r"shape \(2,\) for 5 tokens"),
        ("infinite", r"is inf at token 1 of sample 40/0: not finite"),
        ("other", r"gave the columns \['returns'\]; its record says \['advantages'\]"),
        ("raises", r"failed: division by zero"),
    ],
)
def test_wrong_output_is_refused(behaviour, message):
    with pytest.raises(RunError, match=message):
        apply_advantage(batch(), component(behaviour))


def test_a_plugin_that_raises_keeps_its_traceback():
    with pytest.raises(RunError) as caught:
        apply_advantage(batch(), component("raises"))
    assert "ZeroDivisionError" in str(caught.value.cause)
