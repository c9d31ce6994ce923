"""Reading run files and flags, laying them over one another, and building dataclasses from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.config.build import build, plain
from miles_core.config.source import Node, merge, read_flags, read_toml, toml_text
from miles_core.errors import UserError


def read(text: str) -> Node:
    return read_toml(text, lambda line: f"run.toml:{line}")


def origin(node: Node, *path: str | int) -> str:
    for part in path:
        node = node.value[part]
    return node.origin


# ---- Lines --------------------------------------------------------------------------------------------------------

# Every number in it is the number of its own line.
LINES = '''\
top = 1
# comment = 99
[table]  # [no.table]
key = 4
dotted.key."quoted key" = 5
'lit.eral' = 6
inline = { a = 7, b = { c = 7 } }
text = """
not.a.key = 9
[nor_a_table] \\""" still inside """
after = 11
literal = \'\'\'
x = "]" \'\'\'\'
escaped = "a \\" [ # b"
more = 15
array = [
  16.0, # ] }
  "]", [ 18 ],
  { deep = 19, deeper = [ { x = 19 } ] },
]
[table.child]
key = 22
[[list]]
key = 24
[list.sub]
key = 26
[[list]]
[[list.nested]]
key = 29
[[list.nested]]
key = 31
["quoted.table".x]
key=33
[ spaced . out ]
date = 1979-05-27 07:32:00
key = 36
'''


def test_every_value_knows_its_line() -> None:
    numbers = {(path, node.value, node.origin) for path, node in read(LINES).leaves() if type(node.value) is int}
    assert len(numbers) == 17
    assert origin(read(LINES), "table", "array", 2, 0) == "run.toml:18"
    assert {origin for _, value, origin in numbers if origin != f"run.toml:{value}"} == set()


@given(
    st.recursive(
        st.booleans() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=12,
    )
)
def test_any_document_is_scanned_to_its_end_and_keeps_its_values(noise: Any) -> None:
    text = toml_text({"noise": {"x": noise}}) + "[probe]\nkey = 'here'\n"
    tree = read(text)
    assert origin(tree, "probe", "key") == f"run.toml:{text.count(chr(10))}"
    assert tree.plain() == {"noise": {"x": noise}, "probe": {"key": "here"}}


def test_windows_line_ends_count_once() -> None:
    assert origin(read("a = 1\r\nb = 2\r\n[c]\r\nd = 3\r\n"), "c", "d") == "run.toml:4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = \n", "run.toml:2: this is not valid TOML: Invalid value"),
        ("a = 1\nb = 2\na = 3\n", "run.toml:3: this is not valid TOML: Cannot overwrite a value"),
        ("a = 1\n[b\n", "run.toml:2: this is not valid TOML: Expected ']' at the end of a table declaration"),
        ('a = 1\n\nb = "x', "run.toml:3: this is not valid TOML: "),
    ],
)
def test_text_that_is_not_toml_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(text)
    assert str(caught.value).startswith(message)


# ---- Flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("loss.clip_high=0.3", {"loss": {"clip_high": 0.3}}),
        ("steps=5", {"steps": 5}),
        ("on=true", {"on": True}),
        ("lr=1e-3", {"lr": 1e-3}),
        ("publish.mode=in-place", {"publish": {"mode": "in-place"}}),
        ("path=/data/train set.jsonl", {"path": "/data/train set.jsonl"}),
        ('text="5"', {"text": "5"}),
        ("empty=", {"empty": ""}),
        ("equation=a=b", {"equation": "a=b"}),
        ("day=2026-01-02", {"day": "2026-01-02"}),
        ('filters=["spread"]', {"filters": ["spread"]}),
        ("schedule={steps=2, prompts_per_step=3}", {"schedule": {"steps": 2, "prompts_per_step": 3}}),
        ("reward.0.weight=2", {"reward": {"0": {"weight": 2}}}),
        ("a=1\nb = 2", {"a": "1\nb = 2"}),
    ],
)
def test_a_flag_is_toml_or_else_a_bare_string(flag: str, values: dict[str, Any]) -> None:
    assert read_flags([flag]).plain() == values


def test_a_flag_is_the_origin_of_all_it_says_and_the_later_one_wins() -> None:
    tree = read_flags(["loss.clip_high=0.3", "loss={name='sft', x=1}", "loss.x=2"])
    assert tree.plain() == {"loss": {"clip_high": 0.3, "name": "sft", "x": 2}}
    assert origin(tree, "loss", "clip_high") == "flag loss.clip_high=0.3"
    assert origin(tree, "loss", "x") == "flag loss.x=2"


@pytest.mark.parametrize("flag", ["loss.clip_high", "=3", "a..b=3", "a b=3", ""])
def test_what_is_no_flag_is_refused(flag: str) -> None:
    with pytest.raises(UserError, match="is not an override; write it as"):
        read_flags([flag])


# ---- Layers -------------------------------------------------------------------------------------------------------


def laid(base: str, *flags: str) -> Node:
    return merge(read(base), read_flags(flags))


def test_tables_merge_key_by_key_and_keep_their_origins() -> None:
    tree = laid("[loss]\nname = 'a'\nlow = 1\nhigh = 2\n", "loss.high=3", "seed=4")
    assert tree.plain() == {"loss": {"name": "a", "low": 1, "high": 3}, "seed": 4}
    assert origin(tree, "loss", "low") == "run.toml:3"
    assert origin(tree, "loss", "high") == "flag loss.high=3"


def test_another_component_does_not_inherit_the_options_of_the_old_one() -> None:
    tree = laid(
        "[loss]\nname = 'a'\nhigh = 2\n[trainer.optimizer]\nname = 'x'\nrate = 1\n", "loss.name=b", "loss.low=5"
    )
    assert tree.plain()["loss"] == {"name": "b", "low": 5}
    assert laid("[loss]\nname = 'a'\nhigh = 2\n", "loss.name=a").plain()["loss"] == {"name": "a", "high": 2}


@pytest.mark.parametrize(
    ("base", "flag", "kept"),
    [
        ("loss = { name = 'a', aggregation = 'group', high = 2 }", "loss.name=b", {"aggregation": "group"}),
        ("engine = { name = 'a', count = 2, gpus = 1, seed = 3 }", "engine.name=b", {"count": 2, "gpus": 1}),
        ("reward = [{ name = 'a', weight = 2.0, strict = true }]", "reward.a.name=b", {"weight": 2.0}),
        ("reward = { name = 'a', weight = 2.0, strict = true }", "reward.name=b", {"weight": 2.0}),
        ("loss = { name = 'a', aggregation = 'group', high = 2 }", "loss=b", None),
    ],
)
def test_what_core_reads_in_a_section_outlives_its_component(base: str, flag: str, kept: Mapping[str, Any]) -> None:
    (changed,) = laid(base, flag).plain().values()
    if isinstance(changed, list):
        (changed,) = changed
    assert changed == ("b" if kept is None else {"name": "b", **kept})


def test_a_bare_name_takes_options() -> None:
    tree = laid("loss = 'a'\n", "loss.high=2")
    assert tree.plain() == {"loss": {"name": "a", "high": 2}}
    assert origin(tree, "loss", "name") == "run.toml:1"
    assert laid("loss = 'a'\n", "loss.name=b").plain() == {"loss": {"name": "b"}}


def test_another_run_name_leaves_the_run_as_it_is() -> None:
    assert laid("name = 'a'\nseed = 1\n", "name=b").plain() == {"name": "b", "seed": 1}


def test_another_model_takes_the_place_of_the_old_one() -> None:
    fresh = "[model]\nfamily = 'tiny'\nconfig = { width = 3 }\ntokenizer = 'bytes'\nmax_tokens = 96\n"
    assert laid(fresh, "model.path=org/name").plain()["model"] == {"path": "org/name", "max_tokens": 96}
    assert laid(fresh, "model.family=tiny").plain()["model"]["config"] == {"width": 3}
    assert "config" not in laid(fresh, "model.family=other").plain()["model"]
    assert laid("[model]\npath = 'a/b'\n", "model.family=tiny").plain()["model"] == {"family": "tiny"}


def test_lists_are_replaced_whole() -> None:
    assert laid("filters = ['a', 'b']", 'filters=["c"]').plain() == {"filters": ["c"]}


STAGES = "filters = ['spread']\n[[stages]]\nname = 'warm-up'\nx = 1\n[[stages]]\nname = 'rl'\nx = 2\n"


def test_list_items_are_addressed_by_name_or_by_number() -> None:
    tree = laid(STAGES, "stages.rl.x=3", "stages.0.y=4", "filters.spread.limit=5")
    assert tree.plain() == {
        "filters": [{"name": "spread", "limit": 5}],
        "stages": [{"name": "warm-up", "x": 1, "y": 4}, {"name": "rl", "x": 3}],
    }
    assert origin(tree, "stages", 1, "x") == "flag stages.rl.x=3"


def test_a_run_file_addresses_the_stages_of_its_recipe_in_the_same_way() -> None:
    assert merge(read(STAGES), read("[stages.rl]\nx = 9\n")).plain()["stages"][1] == {"name": "rl", "x": 9}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("stages.warmup.x=1", "flag stages.warmup.x=1: stages has no item 'warmup'. Did you mean 'warm-up'?"),
        ("stages.7.x=1", "flag stages.7.x=1: stages has no item '7'. Known: rl, warm-up."),
        ("twice.a.x=1", "flag twice.a.x=1: twice has several 'a'; number them, from twice.0"),
    ],
)
def test_a_list_item_that_is_not_there_is_refused(flag: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        laid("twice = ['a', 'a']\n" + STAGES, flag)
    assert str(caught.value) == message


# ---- Dataclasses --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    steps: int = 0

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate must be positive, got {self.rate}")
        if self.steps > 100:
            raise ValueError("there are too many steps")


@dataclass(frozen=True, kw_only=True)
class Outer:
    text: str
    on: bool = False
    count: int = 0
    rate: float = 1.0
    limit: int | None = None
    either: int | str = 0
    mode: Literal["drain", "in-place"] = "drain"
    names: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    inners: tuple[Inner, ...] = ()
    inner: Inner = field(default_factory=Inner)
    extra: Mapping[str, Any] = field(default_factory=dict)


def test_every_supported_type_is_built() -> None:
    text = """
text = "a"
on = true
count = 3
rate = 2
limit = 5
either = "x"
mode = "in-place"
names = ["a", "b"]
rates = [1, 2.5]
inners = [{ rate = 3 }, {}]
inner.rate = 0.5
extra = { a = [1, { b = "c" }] }
"""
    built = build(Outer, read(text), ("part",))
    assert built == Outer(
        text="a",
        on=True,
        count=3,
        rate=2.0,
        limit=5,
        either="x",
        mode="in-place",
        names=("a", "b"),
        rates=(1.0, 2.5),
        inners=(Inner(rate=3.0), Inner()),
        inner=Inner(rate=0.5),
        extra={"a": [1, {"b": "c"}]},
    )
    assert type(built.rate) is float
    assert type(built.rates[0]) is float


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("on = 1", "part.on must be true or false, got 1"),
        ("on = 'True'", 'part.on must be true or false, got "True"'),
        ("count = 1.0", "part.count must be a whole number, got 1.0"),
        ("count = true", "part.count must be a whole number, got true"),
        ("rate = true", "part.rate must be a number, got true"),
        ("rate = 'fast'", 'part.rate must be a number, got "fast"'),
        ("rate = nan", "part.rate must be a number, got NaN"),
        ("limit = 'x'", 'part.limit must be a whole number, got "x"'),
        ("either = 1.5", "part.either must be a whole number or a string, got 1.5"),
        (
            "mode = 'in-plaice'",
            'part.mode must be one of "drain", "in-place", got "in-plaice". Did you mean \'in-place\'?',
        ),
        ("mode = 3", 'part.mode must be one of "drain", "in-place", got 3.'),
        ("names = 'a'", 'part.names must be a list, each item a string, got "a"'),
        ("names = ['a', 2]", "part.names.1 must be a string, got 2"),
        ("inner = 3", "part.inner must be a table, got 3"),
        ("inner.rate = 'x'", 'part.inner.rate must be a number, got "x"'),
        ("inner.rat = 1", "part.inner has no option 'rat'. Did you mean 'rate'?"),
        ("inner.rate = -1", "part.inner.rate must be positive, got -1.0"),
        ("inner.steps = 101", "part.inner: there are too many steps"),
        ("inners = [{ rate = 0 }]", "part.inners.0.rate must be positive, got 0.0"),
        ("extra = 1", "part.extra must be a table, got 1"),
        ("txt = 1", "part has no option 'txt'. Did you mean 'text'?"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_line(line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(Outer, read(f"text = 'a'\n{line}\n"), ("part",))
    assert str(caught.value) == f"run.toml:2: {message}"


def test_a_flag_is_blamed_for_what_it_says() -> None:
    with pytest.raises(UserError) as caught:
        build(Inner, laid("steps = 1\n", "rate=-1"), ("part",))
    assert str(caught.value) == "flag rate=-1: part.rate must be positive, got -1.0"


def test_a_flag_is_blamed_before_the_line_that_it_conflicts_with() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Range:
        low: int = 0
        high: int = 1

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")

    with pytest.raises(UserError) as caught:
        build(Range, laid("low = 3\nhigh = 4\n", "high=2"), ("part",))
    assert str(caught.value) == "flag high=2: part.low (3) must not exceed high (2)"


def test_a_missing_option_is_refused_with_what_it_must_be() -> None:
    with pytest.raises(UserError) as caught:
        build(Outer, read("count = 1"), ("part",))
    assert str(caught.value) == "run.toml:1: part.text is missing; it must be a string"


toml_values = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
finite = st.floats(allow_nan=False)
inners = st.builds(Inner, rate=st.floats(1e-9, 1e9), steps=st.integers(0, 100))
outers = st.builds(
    Outer,
    text=st.text(),
    on=st.booleans(),
    count=st.integers(-(2**60), 2**60),
    rate=finite,
    limit=st.none() | st.integers(0, 9),
    either=st.integers(0, 9) | st.text(max_size=5),
    mode=st.sampled_from(["drain", "in-place"]),
    names=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    rates=st.lists(finite, max_size=3).map(tuple),
    inners=st.lists(inners, max_size=2).map(tuple),
    inner=inners,
    extra=st.dictionaries(st.text(max_size=5), toml_values, max_size=3),
)


@given(outers)
def test_what_is_written_as_toml_is_built_again_as_it_was(outer: Outer) -> None:
    assert build(Outer, read(toml_text(plain(outer))), ()) == outer
