"""`miles plugins …`, commands of plugins, and how errors become messages and exit codes."""

from __future__ import annotations

import importlib
import json
import os
import pty
import subprocess
import sys
from typing import Any

import click
import pytest

from miles_core.cli.main import COMMANDS
from miles_core.declarations import declaration_kinds
from miles_core.lifecycle import lifecycle
from miles_core.plugins import discover
from miles_core.specs import CommandSpec
from miles_core.testing.checks import RULES, cases
from miles_core.testing.kits import rules_of

GOOD = """
    @hookimpl
    def miles_losses():
        yield LossSpec(
            name="good-loss", ref="acme_loss:fn", options="acme_options:Good", summary="a good loss",
            needs=frozenset({"old_logprobs", "advantages"}), needs_if={"ref_logprobs": "kl_coef"},
        )

    @hookimpl
    def miles_rewards():
        yield RewardSpec(name="zebra", ref="acme_loss:fn", summary="a reward", deterministic=False)
        yield RewardSpec(name="apple", ref="acme_loss:fn", summary="a reward")
"""
OPTIONS = '''
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 2


@dataclass(frozen=True, kw_only=True)
class Good:
    """What a good loss needs."""

    clip: float
    mode: Literal["a", "b"] = "a"
    parts: tuple[str, ...] = ("x", "y")
    bound: float | None = None
    inner: Inner = field(default_factory=lambda: Inner(depth=5))
'''


def install_good(site: Any, **modules: str) -> None:
    site.install("acme-good", GOOD, **{"acme_options": OPTIONS, "acme_loss": "def fn(inputs, options): ...", **modules})


def rows(text: str) -> dict[str, list[str]]:
    """Plugin -> its line's words."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("acme")}


# ---- list ---------------------------------------------------------------------------------------------------------


def test_list_says_what_plugins_provide_or_why_they_do_not(site: Any) -> None:
    install_good(site)
    site.install("acme-bad", "raise ImportError('libcudart.so.12: cannot open')", version="0.3")
    site.install("acme-old", requires=">=0.0.3,<0.1")
    site.install("acme-off")
    done = site.run("-p", "no:acme-off", "plugins", "list")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].split() == ["Plugin", "Version", "Core", "Status", "Provides"]
    assert {name: " ".join(words) for name, words in rows(done.stdout).items()} == {
        "acme-bad": "acme-bad 0.3 >=0.1 failed ImportError: libcudart.so.12: cannot open",
        "acme-good": "acme-good 1.0 >=0.1 active reward apple, zebra; loss good-loss",
        "acme-off": "acme-off 1.0 >=0.1 disabled by -p or MILES_DISABLE_PLUGINS",
        "acme-old": "acme-old 1.0 >=0.0.3,<0.1 incompatible needs miles-core <0.1,>=0.0.3, found 0.1.0",
    }
    header, *lines = done.stdout.splitlines()
    status = header.index("Status")
    assert {line[status:].split()[0] for line in lines} <= {"active", "disabled", "failed", "incompatible"}


def test_list_as_json_is_whole_even_if_a_plugin_prints(site: Any) -> None:
    install_good(site)
    site.install("acme-loud", "print('noise')\nraise SystemExit")
    done = site.run("plugins", "list", "--json")
    listed = {plugin["plugin"]: plugin for plugin in json.loads(done.stdout)}
    assert listed["acme-loud"] == {
        "plugin": "acme-loud", "version": "1.0", "core": ">=0.1", "entry": "acme_loud",
        "status": "failed", "reason": "SystemExit", "faults": [], "provides": [],
    }  # fmt: skip
    assert listed["acme-good"]["provides"][0] == {
        "kind": "reward", "name": "zebra", "summary": "a reward", "ref": "acme_loss:fn",
    }  # fmt: skip
    assert done.stderr == "noise\n"


def test_list_filters_by_status_and_kind(site: Any) -> None:
    install_good(site)
    site.install("acme-bad", "1 / 0")
    assert list(rows(site.run("plugins", "list", "--status", "failed").stdout)) == ["acme-bad"]
    by_kind = site.run("plugins", "list", "--kind", "loss")
    assert rows(by_kind.stdout) == {"acme-good": ["acme-good", "1.0", ">=0.1", "active", "loss", "good-loss"]}
    sources = json.loads(site.run("plugins", "list", "--kind", "data-source", "--json").stdout)
    assert "jsonl" in {record["name"] for plugin in sources for record in plugin["provides"]}
    assert {record["kind"] for plugin in sources for record in plugin["provides"]} == {"data source"}


def test_on_a_terminal_the_status_is_coloured_and_the_last_column_wrapped(site: Any) -> None:
    site.install("acme-bad", "raise ImportError('" + " ".join(["word"] * 20) + "')")
    screen = on_terminal(site, 80, "plugins", "list", "--status", "failed")
    lines = screen.replace("\r\n", "\n").splitlines()
    assert "\x1b[31mfailed\x1b[0m" in screen
    assert len([line for line in lines if "word" in line]) > 1
    assert max(len(line.replace("\x1b[31m", "").replace("\x1b[0m", "")) for line in lines) <= 80
    assert "\x1b" not in site.run("plugins", "list", "--status", "failed").stdout


def on_terminal(site: Any, columns: int, *args: str) -> str:
    """What `miles ARGS` writes to a terminal of that width."""
    leader, follower = pty.openpty()
    code = "import sys; from miles_core.cli.main import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(site.folder), "COLUMNS": str(columns), "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", code, *args], env=environment, stdout=follower, check=True, timeout=60)
    assert done.returncode == 0
    os.close(follower)
    try:
        return os.read(leader, 1 << 16).decode()
    finally:
        os.close(leader)


# ---- info ---------------------------------------------------------------------------------------------------------


def test_info_shows_traits_and_options_without_importing_the_implementation(site: Any) -> None:
    install_good(site, acme_loss="raise AssertionError('imported')")
    done = site.run("plugins", "info", "Acme_Good")
    assert done.returncode == 0
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[:2] == ["acme-good 1.0 active", "module acme_good, requires miles-core>=0.1"]
    loss = lines.index("loss good-loss: a good loss")
    assert lines[loss + 1 : loss + 11] == [
        "acme_loss:fn",
        "needs: advantages, old_logprobs",
        "needs_if: ref_logprobs: kl_coef",
        "options acme_options:Good",
        "What a good loss needs.",
        "Option Type Default",
        "clip float required",
        "mode Literal['a', 'b'] \"a\"",
        'parts tuple[str, ...] ["x", "y"]',
        "bound float | None unset",
    ]
    assert lines[loss + 11] == "inner.depth int 5"
    assert lines[lines.index("reward zebra: a reward") + 2] == "deterministic: no"


def test_info_of_a_failed_plugin_shows_its_traceback(site: Any) -> None:
    site.install("acme-bad", "def load():\n    return {}['weights']\nload()")
    done = site.run("plugins", "info", "acme-bad")
    assert done.returncode == 0
    assert "KeyError: 'weights'" in done.stdout
    assert "return {}['weights']" in done.stdout


@pytest.mark.parametrize(
    "options",
    [
        "raise SystemExit(1)",
        "class Good: pass",
        "from dataclasses import dataclass\n@dataclass\nclass Good:\n    a: 'Missing' = 1",
        "from dataclasses import *\n@dataclass\nclass Good:\n    a: int = field(default_factory=lambda: 1 / 0)",
    ],
)
def test_info_survives_broken_options(site: Any, options: str) -> None:
    install_good(site, acme_options=options)
    done = site.run("plugins", "info", "acme-good")
    assert done.returncode == 0
    assert "options acme_options:Good cannot be shown: " in done.stdout


def test_info_of_an_unknown_plugin_names_the_nearest(site: Any) -> None:
    install_good(site)
    done = site.run("plugins", "info", "acme-god")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: no plugin 'acme-god' is installed. Did you mean 'acme-good'")


# ---- check --------------------------------------------------------------------------------------------------------


def faults(name: str) -> dict[str, list[str]]:
    """The rules about the plugin as a whole that it breaks; those about its components are tried in test_kits.py."""
    verdicts = [case.run() for case in cases(discover().plugin(name)) if not case.record]
    return {verdict.rule: list(verdict.faults) for verdict in verdicts if verdict.faults}


CONSTANT = """
    @hookimpl
    def miles_rewards():
        yield RewardSpec(name="constant", ref="acme_reward:Constant", options="acme_options:Options", summary="one")
"""
REWARD = """
class Constant:
    def __init__(self, options):
        self.value = options.value

    def score(self, samples):
        return [self.value for _ in samples]
"""


def install_constant(site: Any, value: str = "0.5") -> None:
    site.install("acme-good", CONSTANT, acme_reward=REWARD, acme_options=dataclass(f"value: float = {value}"))


def test_a_good_plugin_keeps_every_rule(site: Any) -> None:
    install_constant(site)
    assert faults("acme-good") == {}
    done = site.run("plugins", "check", "acme-good")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "acme-good 1.0"
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["ok"] * (len(RULES) + 1)
    assert done.stdout.splitlines()[-1] == "  ok    reward constant: 4 of 4 rules kept"


def test_a_component_that_breaks_a_rule_is_a_failure_with_the_rule_and_the_fault(site: Any) -> None:
    install_constant(site, value="float('inf')")
    done = site.run("plugins", "check", "acme-good")
    assert done.returncode == 1
    assert (
        "  fail  reward constant: gives one finite score for each sample\n        the score of '42' is inf"
        in done.stdout
    )
    assert "changes no sample" not in done.stdout  # it is kept


def test_verbose_shows_every_rule_about_every_component(site: Any) -> None:
    install_constant(site)
    shown = site.run("plugins", "check", "acme-good", "-v").stdout.splitlines()
    assert [line.split()[0] for line in shown[1:]] == ["ok"] * (len(RULES) + 4)
    assert "  ok    reward constant: scores an empty response" in shown


def loss(ref: str = "acme_loss:fn", options: str | None = None) -> str:
    return (
        f"@hookimpl\ndef miles_losses():\n    yield LossSpec(name='a', ref='{ref}', options={options!r}, summary='s')\n"
    )


def dataclass(fields: str, decorator: str = "frozen=True, kw_only=True") -> str:
    head = "from dataclasses import dataclass, field\nfrom typing import *\n"
    return f"{head}@dataclass({decorator})\nclass Options:\n    {fields}"


WITH_OPTIONS = loss(options="acme_options:Options")
CALLBACK = """
@hookimpl
def miles_callbacks():
    yield CallbackSpec(name="a", ref="acme_loss:Back", summary="s", runs_on=frozenset({"driver", "trainer"}))
"""
SYNC = """
@hookimpl
def miles_weight_syncs():
    yield WeightSyncSpec(
        name="a", ref="acme_loss:fn", receiver="acme_loss:Receiver", trainer="t", engine="e", summary="s"
    )
"""
CHECKED = """
@hookimpl
def miles_data_sources():
    yield DataSourceSpec(name="a", ref="acme_loss:fn", check="acme_check:check", summary="s")
"""
RECIPE = "@hookimpl\ndef miles_recipes():\n    yield RecipeSpec(name='a', ref='acme_bad:absent.toml', summary='s')"

BROKEN: dict[str, tuple[str, dict[str, str], str, str]] = {
    "failed": ("1 / 0", {}, "loads", "failed: ZeroDivisionError: division by zero"),
    "empty": ("", {}, "declares_something", "it declares nothing"),
    "heavy": ("import sglang\n" + loss(), {"sglang": ""}, "imports_lightly", "importing it also imports sglang"),
    "heavy options": (
        WITH_OPTIONS,
        {"sglang": "", "acme_options": "import sglang\n" + dataclass("a: int = 1")},
        "imports_lightly",
        "importing it also imports sglang",
    ),
    "heavy check": (
        CHECKED,
        {"sglang": "", "acme_check": "import sglang\ndef check(options): ..."},
        "imports_lightly",
        "importing it also imports sglang",
    ),
    "absent reference": (
        loss("acme_loss:other"),
        {},
        "references_resolve",
        "loss a: acme_loss:other cannot be loaded: AttributeError: module 'acme_loss' has no attribute 'other'",
    ),
    "exiting reference": (
        loss("acme_exits:fn"),
        {"acme_exits": "exit(0)"},
        "references_resolve",
        "loss a: acme_exits:fn cannot be loaded: SystemExit: 0",
    ),
    "constant": (
        loss("acme_loss:__name__"),
        {},
        "references_resolve",
        "loss a: acme_loss:__name__ is a str, which cannot be called",
    ),
    "absent receiver": (
        SYNC,
        {},
        "references_resolve",
        "weight sync a: acme_loss:Receiver cannot be loaded: AttributeError",
    ),
    "absent check": (
        CHECKED,
        {"acme_check": ""},
        "references_resolve",
        "data source a: acme_check:check cannot be loaded: AttributeError",
    ),
    "absent recipe": (RECIPE, {}, "references_resolve", "recipe a: acme_bad:absent.toml cannot be read"),
    "command": (
        "@hookimpl\ndef miles_commands():\n    yield CommandSpec(name='a', ref='acme_loss:fn', summary='s')",
        {},
        "references_resolve",
        "command a: acme_loss:fn is no click.Command",
    ),
    "mutable options": (
        WITH_OPTIONS,
        {"acme_options": dataclass("a: int = 1", "kw_only=True")},
        "options_fit_run_files",
        "acme_options:Options: Options is not frozen",
    ),
    "positional options": (
        WITH_OPTIONS,
        {"acme_options": dataclass("a: int = 1", "frozen=True")},
        "options_fit_run_files",
        "acme_options:Options: a is not keyword-only",
    ),
    "unsupported option": (
        WITH_OPTIONS,
        {"acme_options": dataclass("a: set[str] | None = None")},
        "options_fit_run_files",
        "acme_options:Options: a: a run file cannot give a set; use tuple[X, ...] or Mapping[str, X]",
    ),
    "an option that is core's own key": (
        WITH_OPTIONS,
        {"acme_options": dataclass("name: str = 'a'\n    aggregation: str = 'b'")},
        "options_fit_run_files",
        "acme_options:Options: name is a key of Miles's own there; call it otherwise",
    ),
    "default of another type": (
        WITH_OPTIONS,
        {"acme_options": dataclass("a: int = 'one'")},
        "options_fit_run_files",
        'line 1: a must be a whole number, got "one"',
    ),
    "default that changes": (
        WITH_OPTIONS,
        {"acme_options": dataclass("a: tuple[int, ...] = field(default_factory=lambda: [1])")},
        "options_fit_run_files",
        "acme_options:Options: its defaults Options(a=[1]) come back from a run file as Options(a=(1,))",
    ),
    "options that cannot be pickled": (
        WITH_OPTIONS,
        {"acme_options": dataclass("a: int = 1\n    def __reduce__(self): raise TypeError('stay here')")},
        "records_travel",
        "TypeError: stay here",
    ),
    "other records": (
        "import itertools\ncount = itertools.count()\n" + loss().replace("name='a'", "name=f'a{next(count)}'"),
        {},
        "records_are_the_same_again",
        "asked again, it declares something else: LossSpec(name='a1'",
    ),
    "core's name": (
        "@hookimpl\ndef miles_filters():\n    yield FilterSpec(name='nonzero-std', ref='acme_loss:fn', summary='s')",
        {},
        "names_are_free",
        "filter 'nonzero-std' is also miles-core's",
    ),
    "core's command": (
        "@hookimpl\ndef miles_commands():\n    yield CommandSpec(name='train', ref='acme_loss:command', summary='s')",
        {"acme_loss": "import click\n@click.command()\ndef command(): ..."},
        "names_are_free",
        "command 'train' is also miles-core's",
    ),
    "deaf callback": (
        CALLBACK,
        {"acme_loss": "class Back:\n    def run_end(self): ..."},
        "callbacks_have_hooks",
        "callback a runs on trainer but hears none of its hooks",
    ),
    "wrong callback": (
        CALLBACK,
        {"acme_loss": "class Back:\n    def run_end(self): ...\n    def model_built(self, modl): ..."},
        "callbacks_have_hooks",
        "acme_loss:Back.model_built takes 'modl'; the hook gives context, model",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that_breaks_a_rule_breaks_only_that_rule(site: Any, case: str) -> None:
    body, modules, rule, fault = BROKEN[case]
    site.install("acme-bad", body, **{"acme_loss": "def fn(inputs, options): ...", **modules})
    found = faults("acme-bad")
    assert list(found) == [rule]
    assert found[rule][0].startswith(fault)


@pytest.mark.parametrize(("requires", "bounded"), [(">=0.1", True), ("~=0.1", True), ("<0.2", False), ("", False)])
def test_a_plugin_needs_a_lower_bound_on_core(site: Any, requires: str, bounded: bool) -> None:
    site.install("acme-bad", loss(), acme_loss="def fn(): ...", requires=requires)
    assert faults("acme-bad") == (
        {} if bounded else {"bounds_core": [f"its requirement miles-core{requires} has no lower bound"]}
    )


def test_check_without_a_name_checks_all_that_are_not_disabled_and_exits_with_1(site: Any) -> None:
    install_constant(site)
    site.install("acme-bad", "1 / 0")
    site.install("acme-off", "1 / 0")
    real = [plugin.name for plugin in discover().plugins if not plugin.name.startswith("acme")]
    disabled = [argument for name in ["acme-off", *real] if name != "miles-core" for argument in ("-p", f"no:{name}")]
    done = site.run(*disabled, "plugins", "check")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("acme", "miles"))] == [
        "acme-bad", "acme-good", "miles-core",
    ]  # fmt: skip
    assert done.stdout.splitlines()[-1] == "1 of 3 plugins break a rule: acme-bad"


def test_every_rule_says_what_it_asks_in_one_line() -> None:
    rules = [*RULES, *(rule for kind in declaration_kinds().values() for rule in rules_of(kind))]
    assert [rule.__name__ for rule in rules if not (rule.__doc__ or "").strip() or "\n" in str(rule.__doc__)] == []
    assert all(rules_of(kind) for kind in declaration_kinds().values() if kind is not CommandSpec)


# ---- hooks --------------------------------------------------------------------------------------------------------


def test_hooks_says_family_age_and_who_implements_each(site: Any) -> None:
    install_good(site)
    site.install(
        "acme-back",
        CALLBACK.replace("acme_loss", "acme_callback"),
        acme_callback="class Back:\n    def run_end(self): ...",
    )
    site.install("acme-lame", CALLBACK.replace("acme_loss", "acme_absent"))
    done = site.run("plugins", "hooks")
    assert done.returncode == 0
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert lines["miles_losses"][:2] == ["declaration", "0.1"]
    assert "acme-good" in lines["miles_losses"][2]
    assert lines["run_end"] == ["driver", "0.1", "acme-back:a"]
    assert lines["model_built"] == ["trainer", "0.1"]
    assert lines["engine_started"] == ["rollout", "0.1"]
    assert "acme-lame: acme_absent:Back cannot be loaded" in done.stderr


CALLBACKS = """
@hookimpl
def miles_callbacks():
    both = frozenset({"driver", "trainer"})
    yield CallbackSpec(name="one", ref="acme_heard:One", summary="s", runs_on=both)
    yield CallbackSpec(name="two", ref="acme_heard:Two", summary="s", runs_on=both)
    yield CallbackSpec(name="late", ref="acme_heard:Late", summary="s", runs_on=frozenset({"driver"}))
"""
BACK = """
from miles_core import hookimpl

class One:
    def __init__(self, options): ...
    def step_end(self, step): print("one", step)
    def model_built(self, model): ...

class Two(One):
    def step_end(self, step): print("two", step)

class Late(One):
    @hookimpl(trylast=True)
    def step_end(self, step): print("late", step)
"""
RUN = """
[schedule]
steps = 1
prompts_per_step = 1
samples_per_prompt = 2
[model]
family = "qwen3"
[data]
name = "jsonl"
path = "data.jsonl"
[reward]
name = "exact"
[engine]
name = "torch"
[trainer]
name = "torch"
[loss]
name = "grpo"
[advantage]
name = "grpo"
"""


@pytest.mark.parametrize(
    ("callbacks", "driver", "trainer"),
    [
        (["one", "two"], ["one", "two"], ["one", "two"]),
        (["two", "one"], ["two", "one"], ["two", "one"]),
        (["late", "two", "one", "two"], ["two", "one", "two", "late"], ["two", "one", "two"]),
    ],
)
def test_hooks_of_a_run_are_in_the_order_in_which_they_are_called(
    site: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, callbacks: Any, driver: Any, trainer: Any
) -> None:
    pytest.importorskip("miles_grpo")
    pytest.importorskip("miles_torch")
    site.install("acme-back", CALLBACKS, acme_heard=BACK)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    done = site.run("plugins", "hooks", "run.toml", f"callbacks={json.dumps(callbacks)}")
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    qualified = [", ".join(f"acme-back:{name}" for name in names) for names in (driver, trainer)]
    assert lines == [
        ["Hook", "Family", "Since", "Called, in this order"],
        ["step_end", "driver", "0.1", qualified[0]],
        ["model_built", "trainer", "0.1", qualified[1]],
    ]
    made = [getattr(importlib.import_module("acme_heard"), name.capitalize())(None) for name in callbacks]
    lifecycle("driver", made).step_end(run=None, step=7, metrics={})
    assert capsys.readouterr().out.split() == [word for name in driver for word in (name, "7")]


# ---- The group: commands of plugins, options, exit codes -----------------------------------------------------------


def command(body: str) -> str:
    return f"import click\nfrom miles_core.errors import *\n@click.command()\ndef go():\n    {body}\n"


def install_command(site: Any, module: str) -> None:
    body = (
        "@hookimpl\ndef miles_commands():\n    yield CommandSpec(name='acme-go', ref='acme_command:go', summary='goes')"
    )
    site.install("acme-cli", body, acme_command=module)


@pytest.mark.parametrize(
    ("body", "code", "stdout", "stderr"),
    [
        ("click.echo('gone')", 0, "gone\n", ""),
        ("raise UserError('no such file')", 2, "", "Error: no such file\n"),
        ("raise RunError('engine 1 died', 'its traceback')", 1, "", "its traceback\nError: engine 1 died\n"),
        ("raise RunError('late')", 1, "", "Error: late\n"),
        ("raise KeyboardInterrupt", 130, "", "\nError: interrupted\n"),
        ("click.get_current_context().exit(7)", 7, "", ""),
    ],
)  # fmt: skip
def test_a_commands_end_becomes_an_exit_code(site: Any, body: str, code: int, stdout: str, stderr: str) -> None:
    install_command(site, command(body))
    done = site.run("acme-go")
    assert (done.returncode, done.stdout, done.stderr) == (code, stdout, stderr)


def test_a_command_whose_module_fails_shows_the_plugins_traceback(site: Any) -> None:
    install_command(site, "import click\nclick.absent")
    done = site.run("acme-go")
    assert done.returncode == 2
    assert done.stderr.splitlines()[1].startswith(f'  File "{site.folder / "acme_command.py"}", line 2')
    assert "acme_command:go cannot be loaded: AttributeError" in done.stderr.splitlines()[-1]


def test_an_unknown_command_names_the_nearest_and_what_is_not_loaded(site: Any) -> None:
    install_command(site, command("pass"))
    site.install("acme-bad", "1 / 0")
    done = site.run("acme-og")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "Error: unknown command 'acme-og'. Did you mean 'acme-go'?"
    assert "  acme-bad: failed, ZeroDivisionError: division by zero" in done.stderr.splitlines()


def test_a_plugin_disabled_by_flag_adds_no_command(site: Any) -> None:
    install_command(site, command("pass"))
    assert site.run("-p", "no:acme-cli", "acme-go").returncode == 2
    assert site.run("acme-go", MILES_DISABLE_PLUGINS="*").returncode == 2
    assert site.run("acme-go").returncode == 0


@pytest.mark.parametrize("value", ["acme-cli", "no:", ""])
def test_p_takes_only_no_name(site: Any, value: str) -> None:
    done = site.run("-p", value, "plugins", "list")
    assert done.returncode == 2
    assert "is not of the form no:NAME" in done.stderr


def test_help_and_version_do_not_die_of_a_broken_plugin(site: Any) -> None:
    site.install("acme-bad", "raise SystemExit(9)")
    shown = site.run("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in COMMANDS)
    assert site.run("--version").stdout == "miles 0.1.0 (plugin API 1)\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name: str) -> None:
    module, _, attribute = COMMANDS[name][0].partition(":")
    assert isinstance(getattr(importlib.import_module(module), attribute), click.Command)
