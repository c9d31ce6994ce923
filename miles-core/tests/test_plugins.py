"""Discovery, status and isolation of plugins, lookups in the catalog, and lifecycle hooks."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.utils import canonicalize_name

from miles_core import FilterSpec, LossSpec, RewardSpec, hookimpl
from miles_core.errors import PluginError, RunError, UserError
from miles_core.hooks import DeclarationHooks
from miles_core.plugins import discover, lifecycle, load_exact, normalised, options_of, resolve

GOOD = """
    @hookimpl
    def miles_losses():
        yield LossSpec(name="good-loss", ref="acme_good.loss:fn", summary="a good loss")
"""


NO_REQUIREMENT = "does not say which miles-core it needs; its dependencies lack miles-core>=0.1.0"


def statuses(catalog: Any) -> dict[str, tuple[str, str]]:
    return {plugin.name: (plugin.status, plugin.reason) for plugin in catalog.plugins if plugin.name.startswith("acme")}


# ---- Discovery ----------------------------------------------------------------------------------------------------


def test_a_plugin_is_found_by_its_entry_point_and_known_by_its_distribution(site: Any) -> None:
    site.install("Acme_Good", GOOD, version="2.5", requires=">=0.1,<0.2", points="[miles.plugins]\ngrpo = acme_good\n")
    (site.folder / "acme_good.py").write_text((site.folder / "Acme_Good.py").read_text())
    plugin = discover().plugin("acme.good")
    assert (plugin.name, plugin.version, plugin.entry) == ("acme-good", "2.5", "acme_good")
    assert (plugin.requires, plugin.status, plugin.reason, plugin.traceback) == (">=0.1,<0.2", "active", "", None)
    assert [record.name for record in plugin.records] == ["good-loss"]


def test_core_is_a_plugin_like_any_other() -> None:
    core = discover().plugin("miles-core")
    assert core.status == "active"
    assert ("filter", "nonzero-std") in {(record.kind, record.name) for record in core.records}


HOSTILE = {
    "missing library": (
        "raise ImportError('libcudart.so.12: cannot open shared object file')",
        "ImportError: libcudart.so.12: cannot open shared object file",
    ),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "base exception": ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
    "message that raises": (
        "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd",
        "Odd: (its message cannot be read)",
    ),
    "several lines": ("raise RuntimeError('one\\ntwo')", "RuntimeError: one"),
    "syntax": ("def (", "SyntaxError: invalid syntax (acme_bad.py, line 3)"),
    "declaration raises": (
        "@hookimpl\ndef miles_losses():\n    yield LossSpec(name='a', ref='a:b', summary='s')\n    raise KeyError('x')",
        "KeyError: 'x'",
    ),
    "declaration exits": ("@hookimpl\ndef miles_losses():\n    exit(0)", "SystemExit: 0"),
    "bad record": (
        "@hookimpl\ndef miles_losses():\n    yield LossSpec(name='Bad Name', ref='a:b', summary='s')",
        "ValueError: LossSpec name 'Bad Name' is not kebab-case",
    ),
    "wrong kind": (
        "@hookimpl\ndef miles_losses():\n    yield FilterSpec(name='a', ref='a:b', summary='s')",
        "miles_losses gave FilterSpec 'a', which is no LossSpec",
    ),
    "not a record": (
        "@hookimpl\ndef miles_losses():\n    yield 'grpo'",
        "miles_losses gave str 'grpo', which is no LossSpec",
    ),
    "returns nothing": (
        "@hookimpl\ndef miles_losses():\n    pass",
        "miles_losses returned None; it must yield LossSpec records",
    ),
    "returns a record": (
        "@hookimpl\ndef miles_losses():\n    return LossSpec(name='a', ref='a:b', summary='s')",
        "miles_losses returned LossSpec; it must yield LossSpec records",
    ),
    "twice": (
        "@hookimpl\ndef miles_losses():\n    return [LossSpec(name='a', ref='a:b', summary='s')] * 2",
        "miles_losses gave the loss 'a' twice",
    ),
    "misspelt": (
        "@hookimpl\ndef miles_loses():\n    return []",
        "miles_loses is not a hook of Miles. Did you mean 'miles_losses' or 'miles_models' or 'miles_filters'?",
    ),
    "undecorated": ("def miles_losses():\n    return []", "miles_losses lacks its @hookimpl"),
    "lifecycle": (
        "@hookimpl\ndef step_end(run, step, metrics):\n    pass",
        "step_end is a hook for the callbacks of a driver; a module cannot implement it",
    ),
    "plain lifecycle": (
        "def before_train_step(step):\n    pass",
        "before_train_step is a hook for the callbacks of a trainer; a module cannot implement it",
    ),
    "wrapper": (
        "@hookimpl(wrapper=True)\ndef miles_losses():\n    yield",
        "miles_losses is a wrapper; a declaration cannot wrap those of others",
    ),
    "arguments": (
        "@hookimpl\ndef miles_losses(config):\n    return []",
        "miles_losses takes arguments; it is called with none",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_whatever_a_plugin_does_only_that_plugin_fails(site: Any, case: str) -> None:
    body, reason = HOSTILE[case]
    site.install("acme-good", GOOD)
    site.install("acme-bad", body)
    assert statuses(discover()) == {"acme-bad": ("failed", reason), "acme-good": ("active", "")}


def test_a_failed_plugin_keeps_the_traceback_of_its_own_code(site: Any) -> None:
    site.install("acme-bad", "import acme_helper", acme_helper="def load():\n    return 1 / 0\n\nload()\n")
    traceback = discover().plugin("acme-bad").traceback
    lines = [line.strip() for line in str(traceback).splitlines()]
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].startswith(f'File "{site.folder / "acme_bad.py"}"')
    assert "return 1 / 0" in lines
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_a_failed_plugin_offers_nothing_even_if_it_yielded_before_it_raised(site: Any) -> None:
    site.install("acme-bad", HOSTILE["declaration raises"][0])
    assert [entry for entry in discover().all(LossSpec) if entry.plugin.name == "acme-bad"] == []


def test_ctrl_c_while_a_plugin_is_imported_is_not_the_plugins_failure(site: Any) -> None:
    site.install("acme-bad", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover()


def test_what_a_plugin_prints_goes_to_stderr(site: Any, capsys: pytest.CaptureFixture[str]) -> None:
    site.install("acme-loud", "print('hello')" + GOOD.replace("\n    ", "\n"))
    assert discover().plugin("acme-loud").status == "active"
    assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ("[miles.plugins]\na=acme_odd\nb=x\n", "has 2 entry points in the group miles.plugins; a plugin has one"),
        ("[miles.plugins]\na = acme_odd:plugin\n", "its entry point 'acme_odd:plugin' does not name a module"),
        ("[miles.plugins]\na = acme_odd [extra]\n", "its entry point 'acme_odd [extra]' does not name a module"),
    ],
)  # fmt: skip
def test_a_plugin_has_one_entry_point_that_names_a_module(site: Any, points: str, reason: str) -> None:
    site.install("acme-odd", points=points)
    assert statuses(discover()) == {"acme-odd": ("failed", reason)}


def test_broken_metadata_are_a_row_too(site: Any) -> None:
    site.install("acme-good", GOOD)
    site.install("acme-lost")
    (site.folder / "acme_lost-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe Name")
    site.install("acme-torn", points="[miles.plugins]\nx = acme_torn\nno equals sign here\n")
    found = statuses(discover())
    assert found.pop("acme-good") == ("active", "")
    assert {name: status for name, (status, _) in found.items()} == {"acme-lost": "failed", "acme-torn": "failed"}
    assert all(reason.startswith("its metadata cannot be read (") for _, reason in found.values())


def test_distributions_that_are_no_plugins_are_not_looked_into(site: Any) -> None:
    site.install("acme-other", points="[console_scripts]\nx = acme_other:main\n")
    (site.folder / "acme_other-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe not even text")
    site.install("acme-binary")
    (site.folder / "acme_binary-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe[miles.plugins]\n")
    assert statuses(discover()) == {}


def test_of_two_versions_on_the_path_the_first_counts_as_it_does_for_imports(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("acme-good", GOOD, version="1.0")
    newer = type(site)(tmp_path / "newer")
    newer.folder.mkdir()
    newer.install("acme-good", GOOD, version="2.0")
    monkeypatch.syspath_prepend(str(newer.folder))
    assert [plugin.version for plugin in discover().plugins if plugin.name == "acme-good"] == ["2.0"]


def test_the_catalog_does_not_depend_on_the_order_of_the_path(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = type(site)(tmp_path / "other")
    other.folder.mkdir()
    body = GOOD + '        yield LossSpec(name="another", ref="a:b", summary="s")\n'
    site.install("acme-one", body)
    other.install("acme-two", body)
    seen = []
    for order in itertools.permutations([str(site.folder), str(other.folder)]):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [*order, *sys.path])
            catalog = discover()
            seen.append((catalog.plugins, catalog.all(LossSpec)))
    assert seen[0] == seen[1]
    names = [(entry.spec.name, entry.plugin.name) for entry in seen[0][1] if entry.plugin.name.startswith("acme")]
    assert names == [
        ("another", "acme-one"), ("another", "acme-two"), ("good-loss", "acme-one"), ("good-loss", "acme-two"),
    ]  # fmt: skip


@given(st.text(alphabet="aZ09-_.", min_size=1).filter(lambda name: name.strip("-_.") == name))
def test_names_compare_as_on_pypi(name: str) -> None:
    assert normalised(name) == canonicalize_name(name)


# ---- Disabled and incompatible: decided before import ----------------------------------------------------------------

MARK = "import pathlib\npathlib.Path(__file__).with_name('imported').touch()"


@pytest.mark.parametrize(
    ("disable", "variable", "reason"),
    [
        (["Acme.Mark"], "", "by the run file"),
        (["*"], "", "by the run file"),
        ([], "x, acme_mark", "by -p or MILES_DISABLE_PLUGINS"),
        ([], "*", "by -p or MILES_DISABLE_PLUGINS"),
    ],
)
def test_a_disabled_plugin_is_never_imported(
    site: Any, monkeypatch: pytest.MonkeyPatch, disable: list[str], variable: str, reason: str
) -> None:
    site.install("acme-mark", MARK)
    monkeypatch.setenv("MILES_DISABLE_PLUGINS", variable)
    catalog = discover(disable=disable)
    assert statuses(catalog) == {"acme-mark": ("disabled", reason)}
    assert not (site.folder / "imported").exists()
    assert catalog.plugin("miles-core").status == "active"


def test_core_cannot_be_disabled() -> None:
    with pytest.raises(UserError, match="miles-core cannot be disabled"):
        discover(disable=["miles_core"])


@pytest.mark.parametrize(
    ("requires", "status", "reason"),
    [
        (">=0.1,<0.2", "active", ""),
        ("~=0.1", "active", ""),
        ("==0.1.*", "active", ""),
        ("(>=0.1)", "active", ""),
        ("[dev]>=0.1", "active", ""),
        (">=0.1; python_version >= '3'", "active", ""),
        (">=0.2", "incompatible", "needs miles-core >=0.2, found 0.1.0"),
        ("<0.1", "incompatible", "needs miles-core <0.1, found 0.1.0"),
        (">=0.1; extra == 'all'", "incompatible", NO_REQUIREMENT),
        (None, "incompatible", NO_REQUIREMENT),
        (">=banana", "incompatible", "its requirement 'miles-core>=banana' cannot be understood"),
    ],
)  # fmt: skip
def test_the_requirement_on_core_is_checked_before_import(
    site: Any, requires: str | None, status: str, reason: str
) -> None:
    site.install("acme-mark", MARK, requires=requires)
    assert statuses(discover()) == {"acme-mark": (status, reason)}
    assert (site.folder / "imported").exists() == (status == "active")


# ---- Lookups ------------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_nearest_the_known_and_what_is_not_loaded(site: Any) -> None:
    site.install("acme-good", GOOD)
    site.install("acme-bad", HOSTILE["missing library"][0])
    site.install("acme-old", requires="<0.1")
    with pytest.raises(UserError) as caught:
        discover(disable=["acme-off"]).get(LossSpec, "god-loss")
    lines = str(caught.value).splitlines()
    assert lines[0] == "unknown loss 'god-loss'. Did you mean 'good-loss'?"
    assert lines[1].startswith("Known: ")
    assert "good-loss" in lines[1]
    assert "  acme-bad: failed, ImportError: libcudart.so.12: cannot open shared object file" in lines
    assert "  acme-old: incompatible, needs miles-core <0.1, found 0.1.0" in lines


def test_a_name_that_two_plugins_offer_must_be_qualified(site: Any) -> None:
    site.install("acme-one", GOOD)
    site.install("acme-two", GOOD)
    catalog = discover()
    with pytest.raises(UserError, match=r"Say 'acme-one:good-loss' or 'acme-two:good-loss'\."):
        catalog.get(LossSpec, "good-loss")
    assert catalog.get(LossSpec, "acme_two:good-loss").plugin.name == "acme-two"
    with pytest.raises(UserError, match="Did you mean 'acme-two:good-loss' or 'acme-one:good-loss'"):
        catalog.get(LossSpec, "acme-thre:good-loss")


def test_names_of_different_kinds_do_not_meet(site: Any) -> None:
    body = """
        @hookimpl
        def miles_losses():
            yield LossSpec(name="acme", ref="a:b", summary="s")

        @hookimpl
        def miles_rewards():
            yield RewardSpec(name="acme", ref="a:b", summary="s")
    """
    site.install("acme-both", body)
    catalog = discover()
    assert type(catalog.get(LossSpec, "acme").spec) is LossSpec
    assert type(catalog.get(RewardSpec, "acme").spec) is RewardSpec
    with pytest.raises(UserError, match="unknown filter 'acme'"):
        catalog.get(FilterSpec, "acme")


def test_an_unknown_plugin_is_named_with_the_nearest(site: Any) -> None:
    site.install("acme-good", GOOD)
    with pytest.raises(UserError, match=r"no plugin 'acme-god' is installed\. Did you mean 'acme-good'"):
        discover().plugin_set(["acme-god"])


# ---- Workers ------------------------------------------------------------------------------------------------------


def test_a_worker_loads_exactly_the_drivers_plugins_without_a_scan(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("acme-good", GOOD)
    catalog = discover(disable=["acme-mark"])
    wanted = catalog.plugin_set(["miles-core", "acme-good", "acme-good"])
    assert wanted == (("acme-good", "1.0", "acme_good"), ("miles-core", "0.1.0", "miles_core.builtin"))
    site.install("acme-mark", MARK)
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: pytest.fail("scanned"))
    loaded = load_exact(wanted)
    assert loaded.plugins == tuple(map(catalog.plugin, ["acme-good", "miles-core"]))
    assert not (site.folder / "imported").exists()


def test_a_worker_refuses_a_missing_plugin(site: Any) -> None:
    with pytest.raises(UserError, match=r"plugin acme-good 1\.0, which the driver uses, is not installed"):
        load_exact([("acme-good", "1.0", "acme_good")])


def test_a_worker_refuses_another_version_before_it_imports_it(site: Any) -> None:
    site.install("acme-mark", MARK, version="1.1")
    with pytest.raises(UserError, match=r"plugin acme-mark is 1\.1 .* but 1\.0 \(acme_mark\) in the driver's"):
        load_exact([("acme-mark", "1.0", "acme_mark")])
    with pytest.raises(UserError, match="miles-core is"):
        load_exact([("miles-core", "0.0.9", "miles_core.builtin")])
    assert not (site.folder / "imported").exists()


def test_a_plugin_that_fails_only_in_the_worker_shows_its_traceback(site: Any) -> None:
    site.install("acme-bad", "1 / 0")
    with pytest.raises(RunError, match=r"acme-bad is failed .* ZeroDivisionError") as caught:
        load_exact([("acme-bad", "1.0", "acme_bad")])
    assert "acme_bad.py" in str(caught.value.cause)


# ---- References ---------------------------------------------------------------------------------------------------


def test_a_reference_leads_to_its_object() -> None:
    assert resolve("pathlib:Path.home") == Path.home


@pytest.mark.parametrize(
    ("ref", "cause"),
    [
        ("acme_absent:x", ModuleNotFoundError),
        ("pathlib:Pth", AttributeError),
        ("acme_exits:x", SystemExit),
        ("acme_zero:x", ZeroDivisionError),
    ],
)
def test_a_reference_that_does_not_resolve_keeps_its_cause(site: Any, ref: str, cause: type[BaseException]) -> None:
    (site.folder / "acme_exits.py").write_text("raise SystemExit(0)")
    (site.folder / "acme_zero.py").write_text("1 / 0")
    with pytest.raises(PluginError, match=rf"{ref} cannot be loaded: {cause.__name__}") as caught:
        resolve(ref)
    assert type(caught.value.__cause__) is cause
    assert caught.value.__cause__.__traceback__ is not None


def test_options_are_imported_and_must_be_a_dataclass() -> None:
    def spec(options: str | None) -> LossSpec:
        return LossSpec(name="a", ref="a:b", summary="s", options=options)

    assert options_of(spec(None)) is None
    assert options_of(spec("miles_core.specs:LossSpec")) is LossSpec
    with pytest.raises(PluginError, match="pathlib:Path, the options of loss 'a', is no dataclass"):
        options_of(spec("pathlib:Path"))


# ---- Lifecycle hooks ----------------------------------------------------------------------------------------------


class Recorder:
    """Writes down what it hears."""

    def __init__(self, name: str, heard: list[Any]) -> None:
        self.name, self.heard = name, heard

    def step_end(self, step: int, metrics: Any) -> None:
        self.heard.append((self.name, "step_end", step, metrics))

    def weights_published(self, version: int) -> None:
        self.heard.append((self.name, "weights_published", version))


def test_callbacks_are_called_in_their_order_with_the_arguments_they_name() -> None:
    heard: list[Any] = []
    hooks = lifecycle("driver", [Recorder(name, heard) for name in "abc"])
    hooks.step_end(run=None, step=7, metrics={"x": 1.0})
    assert heard == [(name, "step_end", 7, {"x": 1.0}) for name in "abc"]


def test_a_role_hears_its_own_hooks_only() -> None:
    heard: list[Any] = []
    hooks = lifecycle("trainer", [Recorder("a", heard)])
    hooks.weights_published(context=None, version=3)
    assert heard == [("a", "weights_published", 3)]
    assert not hasattr(hooks, "step_end")


def test_hooks_without_callbacks_are_heard_by_nobody() -> None:
    assert lifecycle("rollout", []).engine_started(context=None) == []


def test_hookimpl_on_a_method_may_change_the_order() -> None:
    heard: list[str] = []

    class Last:
        @hookimpl(trylast=True)
        def run_end(self) -> None:
            heard.append("last")

    class Plain:
        def run_end(self) -> None:
            heard.append("plain")

    lifecycle("driver", [Last(), Plain()]).run_end(run=None)
    assert heard == ["plain", "last"]


def test_a_callback_may_be_decorated_wrap_and_inherit() -> None:
    heard: list[str] = []

    class Timer:
        @hookimpl(wrapper=True)
        def run_end(self) -> Any:
            heard.append("before")
            result = yield
            heard.append("after")
            return result

    class Base:
        @staticmethod
        def run_end() -> None:
            heard.append("inherited")

    class Child(Base):
        pass

    lifecycle("driver", [Timer(), Child()]).run_end(run=None)
    assert heard == ["before", "inherited", "after"]


class Silent:
    def step_ended(self, step: int) -> None: ...


class Misspelt:
    def run_end(self) -> None: ...

    @hookimpl
    def step_ended(self, step: int) -> None: ...


class WrongArgument:
    def step_end(self, stp: int) -> None: ...


class Default:
    def step_end(self, step: int = 0) -> None: ...


class KeywordOnly:
    def step_end(self, *, step: int) -> None: ...


class Async:
    async def step_end(self, step: int) -> None: ...


class Yields:
    def step_end(self, step: int) -> Any:
        yield


class NotAMethod:
    step_end = 3


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Silent, r"Silent has no method that is a lifecycle hook\. Its methods: step_ended\. Hooks: run_start, "),
        (Misspelt, r"Misspelt\.step_ended is not a lifecycle hook\. Did you mean 'step_end'"),
        (WrongArgument, r"WrongArgument\.step_end takes 'stp'; the hook gives run, step, metrics"),
        (Default, r"Default\.step_end: 'step' must be a plain argument without a default"),
        (KeywordOnly, r"KeywordOnly\.step_end: 'step' must be a plain argument"),
        (Async, r"Async\.step_end is async; lifecycle hooks are called, not awaited"),
        (Yields, r"Yields\.step_end yields, so its body would never run"),
        (NotAMethod, r"NotAMethod\.step_end must be a method, and is int"),
    ],
)
def test_a_callback_that_would_not_be_heard_is_refused(callback: type, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lifecycle("driver", [callback()])


# ---- The contract -------------------------------------------------------------------------------------------------


def test_every_declaration_hook_can_be_implemented(site: Any) -> None:
    hooks = [name for name in vars(DeclarationHooks) if name.startswith("miles_")]
    site.install("acme-all", "\n".join(f"@hookimpl\ndef {hook}():\n    return []" for hook in hooks))
    assert len(hooks) >= 14
    assert statuses(discover()) == {"acme-all": ("active", "")}
