"""Bad input is refused before anything starts: one message, exit code 2, and no run folder."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from run_kit import MODEL, RUN, Miles


@pytest.fixture(scope="module")
def miles(tmp_path_factory: pytest.TempPathFactory) -> Miles:
    made = Miles(tmp_path_factory.mktemp("bad"))
    bare = made.folder / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    (made.folder / "existing.toml").write_text(RUN.replace(MODEL, '[model]\npath = "bare"\n'))
    (made.folder / "broken.toml").write_text("[loss\n")
    (made.folder / "taken/there").mkdir(parents=True)
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["arithmetics"], "Did you mean 'arithmetic'"),
        (["run.toml", "loss.clip_hihg=0.3"], "Did you mean 'clip_high'"),
        (["run.toml", "reward.name=evn"], "Did you mean 'even'"),
        (["run.toml", "schedule.steps=many"], "schedule.steps"),
        (["run.toml", "schedule.steps=0"], "schedule.steps must be at least 1"),
        (["broken.toml"], "broken.toml:1"),
        (["existing.toml"], "bare has no tokenizer"),
        (
            ["run.toml", "data.path=date.jsonl"],
            "flag data.path=date.jsonl: data.path: there is no file date.jsonl. Did",
        ),
        (["existing.toml", "model.path=nowhere"], "model.path 'nowhere' is no folder"),
        (["run.toml", "folder=taken", "name=there"], "taken/there exists already; choose another name"),
        (["run.toml", "folder=/proc/nothing"], "the run folder /proc/nothing/run cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_at_once(miles: Miles, arguments: list[str], message: str) -> None:
    ended = miles.run("train", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("Error: ")
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not (miles.folder / "runs").exists() or not list((miles.folder / "runs").iterdir())


@pytest.mark.parametrize(
    ("room", "message"),
    [
        (1000, "Error: no temporary file can be written: File too large; set TMPDIR to where there is room\n"),
        (3000, "Error: the run folder {folder} cannot be made: File too large; set folder=… to where there is room\n"),
    ],
)
def test_a_disk_that_is_full_from_the_beginning_leaves_no_folder(
    room: int, message: str, miles: Miles, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which refuses files of so many bytes: the new model's tokenizer, or the manifest."""
    from miles_core.cli.main import main

    monkeypatch.chdir(miles.folder)
    Path("full.toml").write_text(RUN.replace('callbacks = ["probe"]', "").replace('"even"', '"exact"'))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        code = main(["train", "full.toml"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = miles.folder / "runs/full"
    assert (code, capfd.readouterr().err) == (2, message.format(folder=folder))
    assert not folder.exists()


@pytest.mark.parametrize("folder", ["taken/there", "nowhere"])
def test_what_is_no_run_cannot_be_resumed(miles: Miles, folder: str) -> None:
    ended = miles.run("resume", folder)
    assert (ended.code, ended.out) == (2, "")
    assert f"{miles.folder / folder} holds no run" in ended.err


def test_a_checkpoint_that_was_tampered_with_is_named(
    miles: Miles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miles_core.config.layers import open_catalog
    from miles_core.run.folder import write_run_files
    from miles_core.run.plan import make_plan

    target = str(miles.folder / "plain.toml")
    Path(target).write_text(RUN.replace('callbacks = ["probe"]', "").replace('"even"', '"exact"'))
    monkeypatch.chdir(miles.folder)
    plan = make_plan(target, [], open_catalog(target, []))
    write_run_files(plan, tmp_path)
    last = tmp_path / "checkpoints/step-00000002"
    last.mkdir(parents=True)
    (last / "state.json").write_text('{"step": 3}')
    ended = miles.run("resume", str(tmp_path))
    assert (ended.code, ended.out) == (2, "")
    assert f"checkpoint {last} says that it is of step 3; remove it" in ended.err
