"""Twelve hostile plugins are installed together: every command works all the same, and says what is wrong with each."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from typing import Any

import pytest

from miles_core import plugins
from miles_core.plugins import discover
from miles_core.run.folder import load_plan, write_run_files
from miles_core.run.plan import make_plan
from miles_core.watchdog import TimeLimitError, time_limit

FILTER = "@hookimpl\ndef miles_filters():\n    yield FilterSpec(name='{name}', ref='{ref}', summary='s')\n"

LIMIT_S = 1.5

HOSTILE: dict[str, tuple[str, str, str]] = {
    "acme-raises": ("raise ImportError('libcudart.so.12 is not here')", "failed", "ImportError: libcudart.so.12"),
    "acme-exits": ("import sys\nsys.exit(3)", "failed", "SystemExit: 3"),
    "acme-misspells": (
        "@hookimpl\ndef miles_fliters():\n    return []",
        "failed",
        "miles_fliters is not a hook of Miles. Did you mean 'miles_filters'",
    ),
    "acme-lifecycle": (
        "@hookimpl\ndef before_train_step(model):\n    model.zero_()",
        "failed",
        "before_train_step is a hook for the callbacks of a trainer; a module cannot implement it",
    ),
    "acme-taken": (
        FILTER.format(name="nonzero-std", ref="acme_part:Part"),
        "active",
        "filter nonzero-std  [filter nonzero-std is also offered by miles-core]",
    ),
    "acme-old": ("raise AssertionError('imported')", "incompatible", "needs miles-core <0.1, found 0.1"),
    "acme-heavy": (
        "import megatron\n" + FILTER.format(name="heavy", ref="acme_part:Part"),
        "active",
        "filter heavy  [imports megatron, so every command waits]",
    ),
    "acme-nowhere": (
        FILTER.format(name="nowhere", ref="acme_gone.part:Part"),
        "active",
        "filter nowhere  [filter nowhere: there is no acme_gone.part:Part]",
    ),
    "acme-half": (
        FILTER.format(name="half", ref="acme_part:Absent"),
        "active",
        "filter half  [filter half: there is no acme_part:Absent]",
    ),
    "acme-hangs": (
        "import time\nwhile True:\n    try:\n        time.sleep(600)\n    except Exception:\n        pass",
        "failed",
        f"importing acme_hangs takes more than {LIMIT_S:g} s",
    ),
    "acme-lost": ("", "failed", "its metadata cannot be read"),
    "acme-loud": (
        'print(\'[{"not": "json"}]\')\n' + FILTER.format(name="loud", ref="acme_part:Part"),
        "active",
        "filter loud",
    ),
}
"""name -> body of its module, status, and how its line ends."""


@pytest.fixture
def hostile(site: Any) -> Any:
    for name, (body, _, _) in HOSTILE.items():
        site.install(name, body, requires="<0.1" if name == "acme-old" else ">=0.1")
    part = "class Part:\n    def __init__(self, options): ...\n    def keep(self, group):\n        return True\n"
    site.install("acme-good", FILTER.format(name="good", ref="acme_part:Part"), acme_part=part, megatron="")
    (site.folder / "acme_lost-1.0.dist-info" / "METADATA").unlink()  # as a wheel that was put together by hand
    return site


def run(site: Any, *args: str) -> subprocess.CompletedProcess[str]:
    """`miles ARGS`, with less patience for a plugin that hangs."""
    limit = f"import miles_core.plugins as plugins; plugins.IMPORT_LIMIT_S = {LIMIT_S}; "
    done: subprocess.CompletedProcess[str] = site.run(*args, first=limit)
    return done


def test_list_says_what_is_wrong_with_each(hostile: Any) -> None:
    done = run(hostile, "plugins", "list")
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    for name, (_, status, reason) in HOSTILE.items():
        assert f" {status} " in lines[name]
        assert reason in lines[name]
    assert lines["acme-good"].endswith("active        filter good")


def test_list_as_json_has_the_same(hostile: Any) -> None:
    entries = {entry["plugin"]: entry for entry in json.loads(run(hostile, "plugins", "list", "--json").stdout)}
    assert {name: entries[name]["status"] for name in HOSTILE} == {name: case[1] for name, case in HOSTILE.items()}
    assert entries["acme-raises"]["reason"] == "ImportError: libcudart.so.12 is not here"
    assert entries["acme-heavy"]["faults"] == ["imports megatron, so every command waits"]
    assert entries["acme-nowhere"]["faults"] == ["filter nowhere: there is no acme_gone.part:Part"]
    assert entries["acme-good"]["faults"] == []


@pytest.mark.parametrize(
    "metadata",
    [None, "", "Metadata-Version: 2.1\nVersion: 1.0\n", "Metadata-Version: 2.1\nName: acme-bare\n", "\xff\xfe"],
    ids=["no file", "empty", "no name", "no version", "not text"],
)
def test_a_plugin_whose_wheel_lacks_metadata_is_named_with_what_to_do(site: Any, metadata: str | None) -> None:
    site.install("acme-bare", FILTER.format(name="bare", ref="acme_part:Part"))
    site.install("acme-good", FILTER.format(name="good", ref="acme_part:Part"), acme_part="Part = object")
    path = site.folder / "acme_bare-1.0.dist-info" / "METADATA"
    if metadata is None:
        path.unlink()
    else:
        path.write_bytes(metadata.encode("latin-1"))
    done = site.run("plugins", "list")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert " failed " in lines["acme-bare"]
    assert "its metadata cannot be read" in lines["acme-bare"]
    assert lines["acme-bare"].endswith("install it again")
    assert " active " in lines["acme-good"]
    checked = site.run("plugins", "check", "acme-bare")
    assert checked.returncode == 1
    assert "its metadata cannot be read" in checked.stdout


RUN = """
folder = "{folder}"
[schedule]
steps = 1
prompts_per_step = 1
[model]
family = "qwen3"
[data]
name = "jsonl"
path = "{folder}/data.jsonl"
[reward]
name = "exact"
[engine]
name = "torch"
[trainer]
name = "torch"
[loss]
name = "grpo"
[advantage]
name = "dr-grpo"
"""


@pytest.fixture
def run_file(hostile: Any, tmp_path: Any) -> str:
    pytest.importorskip("miles_grpo")
    pytest.importorskip("miles_torch")
    (tmp_path / "data.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    text = RUN.format(folder=tmp_path).replace("prompts_per_step = 1", "prompts_per_step = 1\nsamples_per_prompt = 2")
    (tmp_path / "run.toml").write_text(text)
    return str(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--help",), 0, "Usage: miles"),
        (("--version",), 0, "plugin API 1"),
        (("plugins", "info", "acme-good"), 0, "acme_part:Part"),
        (("plugins", "info", "acme-hangs"), 0, "time.sleep(600)"),
        (("plugins", "check", "acme-good"), 0, "filter good: 2 of 2 rules kept"),
        (("plugins", "hooks"), 0, "acme-good"),
        (("recipes", "list"), 0, "Recipe"),
        (("recipes", "show", "nothing"), 2, ""),
        (("resume", "nowhere"), 2, ""),
        (("-p", "no:acme-hangs", "models", "list"), 0, "Family"),
        (("-p", "no:acme-hangs", "doctor"), 1, "failed ImportError: libcudart.so.12 is not here"),
    ],
)
def test_every_command_works(hostile: Any, args: tuple[str, ...], code: int, words: str) -> None:
    done = run(hostile, *args)
    assert done.returncode == code, done.stderr
    assert words in done.stdout


def test_check_finds_every_one_and_checks_the_others(hostile: Any) -> None:
    installed = {entry["plugin"] for entry in json.loads(run(hostile, "plugins", "list", "--json").stdout)}
    others = sorted(installed - {*HOSTILE, "acme-good", "miles-core"})
    disabled = [part for name in others for part in ("-p", f"no:{name}")]
    done = run(hostile, *disabled, "plugins", "check")
    assert done.returncode == 1
    broken = done.stdout.splitlines()[-1].partition(": ")[2].split(", ")
    assert broken == sorted(HOSTILE.keys() - {"acme-loud"})
    assert "acme_gone.part:Part cannot be loaded: ModuleNotFoundError: No module named 'acme_gone'" in done.stdout


def test_a_run_that_needs_none_of_them_is_planned(run_file: str, hostile: Any) -> None:
    done = run(hostile, "plan", run_file)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["acme-raises:thing", "thing"])
def test_a_run_that_needs_a_broken_one_stops_with_its_own_traceback(run_file: str, hostile: Any, name: str) -> None:
    done = run(hostile, "train", run_file, f'filters=["{name}"]')
    assert done.returncode == 2
    assert 'acme_raises.py", line 3, in <module>' in done.stderr
    assert "raise ImportError('libcudart.so.12 is not here')" in done.stderr
    assert f"unknown filter '{name}'" in done.stderr.replace("\n", " ")
    assert ("acme_exits.py" in done.stderr) == (":" not in name)  # it may be any failed plugin's


@pytest.mark.parametrize("family", ["acme-raises:thing", "lost"])
def test_a_model_family_of_a_broken_plugin_stops_with_its_own_traceback(
    run_file: str, hostile: Any, family: str
) -> None:
    record = "ModelSpec(name='lost', architectures=frozenset({'None'}), ref='acme_lost_family:Family', summary='s')"
    hook = f"@hookimpl\ndef miles_models():\n    yield {record}\n"
    hostile.install("acme-family", hook, acme_lost_family="raise OSError('libfamily.so is not here')")
    done = hostile.run("-p", "no:acme-hangs", "plan", run_file, f"model.family={family}")
    assert done.returncode == 2
    assert f"Error: flag model.family={family}: " in done.stderr
    assert ("libfamily.so is not here" if family == "lost" else "libcudart.so.12 is not here") in done.stderr
    assert 'py", line ' in done.stderr.partition("Error: flag")[0]


TAKEN = {
    "advantages": "AdvantageSpec(name='grpo', groups=True, ref='a:b', summary='s')",
    "data_sources": "DataSourceSpec(name='reasoning-gym', ref='a:b', summary='s')",
    "engines": "EngineSpec(name='torch', devices=frozenset({'cpu'}), ref='a:b', summary='s')",
    "losses": "LossSpec(name='grpo', ref='a:b', summary='s')",
    "models": "ModelSpec(name='qwen3', architectures=frozenset({'None'}), ref='a:b', summary='s')",
    "rewards": "RewardSpec(name='reasoning-gym', ref='a:b', summary='s')",
    "rollouts": "RolloutSpec(name='supervised', ref='a:b', summary='s')",
    "trackers": "TrackerSpec(name='curves', ref='a:b', summary='s')",
    "trainers": "TrainerSpec(name='torch', devices=frozenset({'cpu'}), ref='a:b', summary='s')",
    "weight_syncs": "WeightSyncSpec(name='x', trainer='torch', engine='torch', receiver='a:b', ref='a:b', summary='s')",
}
"""Hook -> a record that takes a name, or a pair, that the recipe arithmetic uses."""


@pytest.fixture
def taken(site: Any) -> Any:
    pytest.importorskip("miles_grpo")
    pytest.importorskip("miles_torch")
    body = "".join(f"@hookimpl\ndef miles_{hook}():\n    yield {record}\n" for hook, record in TAKEN.items())
    site.install("acme-taken", f"from miles_core.specs import *\n{body}")
    return site


def test_a_recipe_means_what_its_own_plugin_and_those_that_it_requires_offer(taken: Any, tmp_path: Any) -> None:
    plan = make_plan("arithmetic", (f"folder={tmp_path}",), discover())
    assert plan.sync is not None
    assert (plan.trainer.plugin, plan.sync.plugin) == ("miles-torch", "miles-torch")
    warm_up, rl = plan.stages
    assert (warm_up.rollout.plugin, rl.loss.plugin, rl.data.plugin) == ("miles-sft", "miles-grpo", "miles-rewards")
    write_run_files(plan, tmp_path / "run")
    assert load_plan(tmp_path / "run", discover()).values == plan.values


def test_a_run_that_is_resumed_means_what_it_meant_before_a_name_was_taken(taken: Any, tmp_path: Any) -> None:
    plan = make_plan("arithmetic", (f"folder={tmp_path}",), discover(disable=["acme-taken"]))
    assert plan.values["trainer"]["name"] == "torch"
    write_run_files(plan, tmp_path / "run")
    assert load_plan(tmp_path / "run", discover()).values == plan.values


def test_a_run_file_over_a_recipe_keeps_what_the_recipe_means(taken: Any, tmp_path: Any) -> None:
    (tmp_path / "run.toml").write_text('recipe = "arithmetic"\n[loss]\nclip_high = 0.3\n')
    done = taken.run("plan", str(tmp_path / "run.toml"))
    assert done.returncode == 0, done.stderr


def test_a_name_that_the_user_says_is_not_guessed(taken: Any) -> None:
    done = taken.run("plan", "arithmetic", "loss.name=grpo")
    assert done.returncode == 2
    assert "loss 'grpo' is offered by 2 plugins. Say 'acme-taken:grpo' or 'miles-grpo:grpo'." in done.stderr


def test_a_misspelt_name_is_no_reason_to_show_tracebacks(run_file: str, hostile: Any) -> None:
    done = run(hostile, "train", run_file, 'filters=["nonzero-sdt"]')
    assert done.returncode == 2
    assert "Did you mean 'nonzero-std'" in done.stderr
    assert "Traceback" not in done.stderr


# ---- The time limit -------------------------------------------------------------------------------------------------


def test_a_plugin_that_hangs_is_stopped_where_it_hangs(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "IMPORT_LIMIT_S", LIMIT_S)
    site.install("acme-hangs", "import time\ntime.sleep(600)")
    started = time.monotonic()
    plugin = discover().plugin("acme-hangs")
    assert time.monotonic() - started < 60
    assert (plugin.status, plugin.reason) == ("failed", f"importing acme_hangs takes more than {LIMIT_S} s")
    assert "time.sleep(600)" in str(plugin.traceback)


def test_the_limit_leaves_an_alarm_of_others_in_place() -> None:
    heard: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(time.monotonic()))
    try:
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.4)
        with time_limit(60, "nothing"):
            time.sleep(0.1)
        while not heard and time.monotonic() - started < 5:
            time.sleep(0.01)
        assert 0.3 < heard[0] - started < 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_limit_strikes_again_where_it_was_swallowed() -> None:
    def stubborn() -> None:
        while True:
            try:
                time.sleep(60)
            except BaseException as error:
                if seen.append(error) or len(seen) > 1:  # type: ignore[func-returns-value]
                    raise

    seen: list[BaseException] = []
    with pytest.raises(TimeLimitError, match=r"stubborn takes more than 0\.1 s"), time_limit(0.1, "stubborn"):
        stubborn()
    assert len(seen) == 2


def test_outside_of_the_main_thread_there_is_no_limit() -> None:
    finished: list[bool] = []

    def body() -> None:
        with time_limit(0.05, "a thread"):
            time.sleep(0.2)
        finished.append(True)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert finished == [True]
