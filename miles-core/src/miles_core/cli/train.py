"""`miles train` and `miles resume`."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from miles_core.config.schema import Plan
    from miles_core.plugins import Catalog
    from miles_core.run.checkpoint import Checkpoint


@click.command()
@click.argument("target", metavar="FILE_OR_RECIPE")
@click.argument("overrides", metavar="[KEY=VALUE]... [-- FLAG...]", nargs=-1)
def train(target: str, overrides: tuple[str, ...]) -> None:
    """Run a run file or a recipe.

    Overrides are values of the run file by their dotted names: schedule.steps=5 loss.clip_high=0.3.
    Relative paths, in the run file too, are relative to the current directory.

    After -- stand flags of the trainer's and the engine's own software, by their own names:
    -- --tensor-model-parallel-size 2.
    """
    from miles_core.config.layers import open_catalog
    from miles_core.config.model import load_family
    from miles_core.run.folder import locked, removed_if_refused, write_run_files, writing
    from miles_core.run.model import prepare_model
    from miles_core.specs import ModelSpec

    catalog = open_catalog(target, overrides)
    plan = _claimed(target, overrides, catalog)
    with locked(plan.folder), removed_if_refused(plan.folder):
        family = load_family(catalog.get(ModelSpec, plan.model.family)) if plan.model.family else None
        with writing(plan.folder):
            write_run_files(plan, plan.folder)
            model = prepare_model(plan.model, family, plan.folder / "model")
        _run(plan, model, None)


def _claimed(target: str, overrides: tuple[str, ...], catalog: Catalog) -> Plan:
    """The plan, with a run folder that nobody else has. Of runs that begin at once, those that nobody has named get a
    folder each."""
    from miles_core.run.folder import claim
    from miles_core.run.plan import make_plan

    plan = make_plan(target, overrides, catalog)
    while not claim(plan):
        plan = make_plan(target, overrides, catalog)
    return plan


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path, file_okay=False))
def resume(folder: Path) -> None:
    """Go on with a run from its last checkpoint, as if it had never stopped."""
    from miles_core.run.folder import load_plan, locked
    from miles_core.run.model import prepare_model
    from miles_core.run.trackers import forget_after

    plan = load_plan(folder)
    with locked(plan.folder):
        last = _last_checkpoint(plan)
        forget_after(plan.folder, last.step if last else -1)
        made = plan.folder / "model"
        model = made if plan.model.path is None else prepare_model(plan.model, None, made)
        _run(plan, model, last)


def _last_checkpoint(plan: Plan) -> Checkpoint | None:
    """Where to go on; None at the start. Raises `UserError` if it is damaged or the run is finished."""
    from miles_core.errors import UserError
    from miles_core.run import checkpoint
    from miles_core.run.driver import refuse_finished

    found = checkpoint.all_of(plan.folder)
    if not found:
        return None
    last = found[-1]
    if last.state["step"] != last.step:
        raise UserError(f"checkpoint {last.folder} says that it is of step {last.state['step']}; remove it")
    refuse_finished(plan, last)
    return last


def _run(plan: Plan, model: Path, resumed: Checkpoint | None) -> None:
    from miles_core.run.console import Console
    from miles_core.run.driver import drive

    console = Console(plan)
    console.start(resumed.step if resumed else None)

    async def driven() -> None:
        # Being told to end is like Ctrl-C, also in the background, where shells have that ignored; and so is a terminal
        # that is gone, unless `nohup` has that ignored.
        task, ends = asyncio.current_task(), [signal.SIGTERM, signal.SIGHUP]
        assert task is not None
        for number in ends if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else ends[:1]:
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        await drive(plan, model, resumed, console)

    try:
        asyncio.run(driven())
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.say(f"interrupted; go on with: miles resume {plan.folder}", "yellow")
        raise KeyboardInterrupt from None
    console.finish()
