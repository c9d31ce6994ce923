"""Every hook's example in docs/hooks is a plugin that is found, keeps the rules, and does in a run what it says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles_core.declarations import declaration_kinds
from miles_core.lifecycle import LIFECYCLE, lifecycle, lifecycle_hooks
from miles_core.plugins import Catalog, discover, resolve
from miles_core.roles import AdvantageInputs, CorrectionInputs, LossInputs, Segments
from miles_core.run.plan import make_plan
from miles_core.testing.checks import check
from miles_core.testing.fakes import make_group, make_run, make_sample

pytestmark = pytest.mark.timeout(900)

HOOKS = Path(__file__).parent / "hooks"
NAMES = [*declaration_kinds(), *(hook for role in LIFECYCLE for hook in lifecycle_hooks(role))]

RUN = """
callbacks = [CALLBACKS]
trackers = ["latest"]
corrections = ["agreement"]
[model]
family = "acme-mistral"
tokenizer = "ascii"
max_tokens = 64
[model.config]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
[data]
name = "counting"
[reward]
name = "brief"
[rollout]
name = "opening"
[sampling]
max_new_tokens = 8
[engine]
name = "counted"
[trainer]
name = "averaged"
[trainer.optimizer]
learning_rate = 1e-3
weight_decay = 0.5
[advantage]
name = "rank"
[loss]
name = "bounded"
[evaluation]
every = 2
prompts = 2
[schedule]
steps = 2
prompts_per_step = 2
samples_per_prompt = 2
minibatches = 2
"""


def module_of(hook: str) -> str:
    """The module of a hook's example that declares something."""
    (found,) = (path for path in (HOOKS / hook).rglob("*.py") if "@hookimpl" in path.read_text())
    return found.relative_to(HOOKS / hook).with_suffix("").parts[0]


def plugin_of(hook: str) -> str:
    return module_of(hook).replace("_", "-")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which all examples are installed, on the path of this process."""
    folder = tmp_path_factory.mktemp("examples") / "site"
    folder.mkdir()
    for hook in NAMES:
        shutil.copytree(HOOKS / hook, folder, dirs_exist_ok=True)
        info = folder / f"{module_of(hook)}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {plugin_of(hook)}\nVersion: 1.0\nRequires-Dist: miles-core>=0.1\n"
        )
        (info / "entry_points.txt").write_text(f"[miles.plugins]\nentry = {module_of(hook)}\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def catalog(site: Path) -> Catalog:
    return discover()


@pytest.fixture(scope="module")
def run(site: Path) -> Path:
    """The folder of a run that uses every example that a run can use."""
    folder = site.parent
    hooks = [hook for role in LIFECYCLE for hook in lifecycle_hooks(role)]
    plugins = [discover().plugin(plugin_of(hook)) for hook in ("miles_callbacks", *hooks)]
    names = [record.name for plugin in plugins for record in plugin.records]
    slow = '{ name = "slow-steps", limit_s = 0 }'
    callbacks = ", ".join(slow if name == "slow-steps" else f'"{name}"' for name in names)
    (folder / "demo.toml").write_text(RUN.replace("CALLBACKS", callbacks))
    (folder / "learning-rate.txt").write_text("0.5")
    done = miles(site, "train", "demo.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "demo"


def miles(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "miles_core", *args],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def log_of(run: Path, member: str) -> str:
    return (run / "logs" / f"{member}.log").read_text()


def only_record(catalog: Catalog, hook: str) -> Any:
    (record,) = catalog.plugin(plugin_of(hook)).records
    return record


def built(catalog: Catalog, hook: str, *args: Any, **options: Any) -> Any:
    """The component of a hook's example, as a run builds it."""
    record = only_record(catalog, hook)
    given = resolve(record.options)(**options) if record.options else None
    return resolve(record.ref)(given, *args)


# ---- All of them ----------------------------------------------------------------------------------------------------


def test_every_hook_has_an_example_and_every_example_a_hook() -> None:
    assert {path.name for path in HOOKS.iterdir() if path.name != "__pycache__"} == set(NAMES)


def test_every_example_has_a_test() -> None:
    assert {f"test_{hook}" for hook in NAMES} <= globals().keys()


@pytest.mark.parametrize("hook", NAMES)
def test_examples_keep_the_rules(hook: str, catalog: Catalog) -> None:
    plugin = catalog.plugin(plugin_of(hook))
    assert plugin.status == "active", plugin.traceback or plugin.reason
    broken = {verdict.rule: verdict.faults for verdict in check(plugin) if verdict.faults}
    assert not broken


@pytest.mark.parametrize("hook", NAMES)
def test_examples_implement_their_hook(hook: str, catalog: Catalog) -> None:
    records = catalog.plugin(plugin_of(hook)).records
    if hook in declaration_kinds():
        assert {type(record) for record in records} == {declaration_kinds()[hook]}
    else:
        assert [hook in dir(resolve(record.ref)) for record in records] == [True]


# ---- Declarations ---------------------------------------------------------------------------------------------------


def test_miles_rollouts(run: Path) -> None:
    metrics = json.loads((run / "latest.json").read_text())
    own = len("Let me see.")  # a token a letter, and none of them is trained
    assert metrics["response_tokens"] - metrics["trained_tokens"] == 4 * own


def test_miles_engines(run: Path) -> None:
    assert int(log_file(run, "requests-0.txt")) >= 2 * 2 + 2 * 2  # a prompt a request: two steps, two evaluations


def log_file(run: Path, name: str) -> str:
    return (run / "logs" / name).read_text().strip()


def test_miles_trainers(run: Path) -> None:
    from safetensors.torch import load_file

    last = load_file(max((run / "checkpoints").iterdir()) / "trainer" / "weights-00000.safetensors")
    policy = load_file(run / "policy" / "model.safetensors")
    (own,) = (tensor for name, tensor in last.items() if name.endswith("layers.1.mlp.up_proj.weight"))
    # Every reward is the same, so there is no gradient: each of two optimizer steps a batch only decays the weights,
    # by the learning rate of the example of before_train_step.
    batch = (1 - 0.5 * 0.5) ** 2
    average = 0.9 * 0.9 + 0.9 * 0.1 * batch + 0.1 * batch**2
    ratio = policy["model.layers.1.mlp.up_proj.weight"].norm() / own.norm()
    assert float(ratio) == pytest.approx(average / batch**2, rel=1e-4)


def test_miles_weight_syncs(run: Path) -> None:
    sent = [line for line in log_of(run, "trainer-0").splitlines() if line.startswith("published ")]
    assert sent == ["published 21 tensors"] * 3  # before the first step and after both; 2 layers of 9 and 3 more


def test_miles_rewards(catalog: Catalog) -> None:
    reward = built(catalog, "miles_rewards", words=3)
    texts = ["it is 42", "42", "I think it is 42", "it is 43", ""]
    assert reward.score([make_sample(text, answer="42") for text in texts]) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_miles_filters(catalog: Catalog) -> None:
    keep = built(catalog, "miles_filters").keep
    assert [keep(make_group(rewards)) for rewards in ([1, 0, 0], [1, 1], [0, 0.5])] == [True, False, False]


def test_miles_advantages(catalog: Catalog) -> None:
    inputs = AdvantageInputs(
        rewards=np.array([5.0, 1.0, 1.0, 7.0]),
        reward_parts={},
        groups=np.array([0, 0, 0, 1]),
        segment_ids=np.array([0, 1, 2, 2, 3]),
        mask=np.array([True, True, False, True, True]),
    )
    found = resolve(only_record(catalog, "miles_advantages").ref)(inputs, None)
    assert found["advantages"].tolist() == [1.0, -0.5, 0.0, -0.5, 0.0]


def test_miles_losses(catalog: Catalog) -> None:
    import torch

    record = only_record(catalog, "miles_losses")
    logprobs = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        logprobs=logprobs,
        segments=Segments(ids=torch.tensor([0, 0]), count=1),
        advantages=torch.tensor([3.0, 1.0]),
        old_logprobs=torch.tensor([-1.0 - np.log(1.5), -9.0], dtype=torch.float64),
    )
    resolve(record.ref)(inputs, resolve(record.options)(most=2.0)).losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-1.5 * 3.0, -2.0 * 1.0])


def test_miles_corrections(catalog: Catalog) -> None:
    import torch

    same, apart = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0 - np.log(4.0)])
    segments = Segments(ids=torch.tensor([0, 0]), count=1)
    inputs = CorrectionInputs(logprobs=same, old_logprobs=same, rollout_logprobs=apart, segments=segments)
    weights = resolve(only_record(catalog, "miles_corrections").ref)(inputs, None).weights
    assert weights.tolist() == pytest.approx([1.0, 0.25])


def test_miles_data_sources(run: Path) -> None:
    assert json.loads((run / "latest.json").read_text())["eval/failed"] == 0


def test_miles_models(run: Path) -> None:
    config = json.loads((run / "policy" / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]


def test_miles_trackers(run: Path) -> None:
    assert json.loads((run / "latest.json").read_text())["step"] == 2


def test_miles_callbacks(run: Path) -> None:
    assert [line.split(":")[0] for line in (run / "slow.txt").read_text().splitlines()] == ["step 1", "step 2"]


def test_miles_recipes(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    plan = make_plan("acme-subtraction", [], catalog)
    assert plan.stages[0].schedule.steps == 40
    assert len(plan.stages) == 2
    assert plan.stages[0].data.options.parameters["max_digits"] == 2


def test_miles_commands(run: Path, site: Path) -> None:
    done = miles(site, "last", str(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step                           2\n")


# ---- Lifecycle ------------------------------------------------------------------------------------------------------


def test_run_start(run: Path) -> None:
    assert os.uname().nodename in (run / "machine.txt").read_text()


def test_rollout_end(run: Path) -> None:
    assert [line.split(",")[0] for line in (run / "lengths.csv").read_text().splitlines()] == ["0", "1"]


def test_step_end(run: Path) -> None:
    assert (run / "progress.txt").read_text() == "100%\n"


def test_eval_end(run: Path) -> None:
    step, reward = (run / "best.txt").read_text().split()
    assert int(step) in (0, 2)
    assert 0 <= float(reward) <= 1


def test_checkpoint_saved(run: Path) -> None:
    newest = max((run / "checkpoints").iterdir())
    assert (run / "backup" / "state.json").read_bytes() == (newest / "state.json").read_bytes()


def test_run_failed(catalog: Catalog, run: Path, tmp_path: Path) -> None:
    assert not (run / "alarm.txt").exists()
    hooks = lifecycle("driver", [built(catalog, "run_failed")])
    hooks.run_failed(run=make_run(tmp_path), error=RuntimeError("the engine died"))
    assert (tmp_path / "alarm.txt").read_text() == "contract failed: the engine died\n"


def test_run_end(run: Path) -> None:
    assert (run / "over.txt").exists()


def test_model_built(run: Path) -> None:
    from safetensors.torch import load_file

    first, last = (
        load_file(path / "trainer" / "weights-00000.safetensors")
        for path in (run / "backup", max((run / "checkpoints").iterdir()))
    )
    (name,) = (name for name in last if "embed" in name)
    assert first[name].equal(last[name])
    assert "embeddings are frozen" in log_of(run, "trainer-0")


def test_before_logprobs(run: Path) -> None:
    passes = [line for line in log_of(run, "trainer-0").splitlines() if line.endswith("without gradient")]
    assert passes == [f"step {step}: a forward pass without gradient" for step in (0, 1)]


def test_before_train_step(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    hooks = lifecycle("trainer", [built(catalog, "before_train_step")])
    optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1)
    given = {"context": None, "step": 0, "model": None, "optimizer": optimizer, "batch": None}
    hooks.before_train_step(**given)
    assert optimizer.param_groups[0]["lr"] == 0.1
    (tmp_path / "learning-rate.txt").write_text("0.5\n")
    hooks.before_train_step(**given)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_step_not_finite(catalog: Catalog) -> None:
    hooks = lifecycle("trainer", [built(catalog, "step_not_finite")])
    told = {"context": None, "step": 0, "model": None, "optimizer": None, "fault": "the loss is nan"}
    assert [hooks.step_not_finite(**told) for _ in range(4)] == [True, True, True, None]


def test_after_train_step(run: Path) -> None:
    assert json.loads((run / "latest.json").read_text())["weight_norm"] > 0


def test_weights_published(run: Path) -> None:
    said = [line for line in log_of(run, "trainer-0").splitlines() if line.startswith("all engines have")]
    assert said == [f"all engines have version {version}" for version in (0, 1, 2)]


def test_engine_started(run: Path) -> None:
    assert log_file(run, "engine-0.txt") == "up"


def test_weights_received(run: Path) -> None:
    assert log_file(run, "received-0.txt") == "2"


def test_the_examples_run_file_uses_an_example_of_every_kind_that_a_run_can(run: Path, catalog: Catalog) -> None:
    text = tomllib.loads((run.parents[1] / "demo.toml").read_text())
    used = json.dumps(text)
    for hook in declaration_kinds():
        names = [record.name for record in catalog.plugin(plugin_of(hook)).records]
        unused = {"miles_filters", "miles_recipes", "miles_commands", "miles_weight_syncs"}
        assert hook in unused or any(f'"{name}"' in used for name in names), hook
