"""`miles`: the command group, its global options, and how errors become messages and exit codes.

Commands are imported when they are called; `miles --help` imports none of them and loads no plugin.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence

import click

from miles_core import PLUGIN_API, __version__
from miles_core.errors import DISK_ERRORS, PluginError, RunError, UserError, nearest

COMMANDS = {
    "train": ("miles_core.cli.train:train", "Run a run file or a recipe."),
    "resume": ("miles_core.cli.train:resume", "Go on with a run from its last checkpoint."),
    "plan": ("miles_core.cli.plan:plan", "Check a run and show it resolved, without starting anything."),
    "recipes": ("miles_core.cli.recipes:recipes", "List and show ready run files."),
    "models": ("miles_core.cli.models:models", "List model families and describe a model."),
    "doctor": ("miles_core.cli.doctor:doctor", "Say what is installed, and what a run lacks."),
    "plugins": ("miles_core.cli.plugins:plugins", "List, explain and check plugins."),
}
"""name -> (the click command, its line in `miles --help`)."""


class _LazyGroup(click.Group):
    """Commands of `COMMANDS`, else of plugins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return _plugin_command(cmd_name)
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def _plugin_command(name: str) -> click.Command:
    """The command that a plugin offers. UserError: none does, or it does not load."""
    from miles_core.plugins import discover, resolve
    from miles_core.specs import CommandSpec

    catalog = discover()
    offered = [entry.spec.name for entry in catalog.all(CommandSpec)]
    if name.rpartition(":")[2] not in offered:
        message = f"unknown command {name!r}. {nearest(name, [*COMMANDS, *offered])}"
        raise UserError("\n".join([message, *catalog.not_loaded()]))
    entry = catalog.get(CommandSpec, name)
    command = resolve(entry.spec.ref)
    if not isinstance(command, click.Command):
        raise PluginError(f"{entry.spec.ref}, the command {name!r} of {entry.plugin.name}, is no click.Command")
    return command


def _disable(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> None:
    """Adds to MILES_DISABLE_PLUGINS while the command runs: every discovery in this process honours it."""
    names = [value.removeprefix("no:") for value in values]
    for name, value in zip(names, values, strict=True):
        if not name or name == value:
            raise click.BadParameter(f"{value!r} is not of the form no:NAME")
    if not names:
        return
    before = os.environ.get("MILES_DISABLE_PLUGINS")
    os.environ["MILES_DISABLE_PLUGINS"] = ",".join([*filter(None, [before]), *names])

    def restore() -> None:
        if before is None:
            del os.environ["MILES_DISABLE_PLUGINS"]
        else:
            os.environ["MILES_DISABLE_PLUGINS"] = before

    ctx.call_on_close(restore)


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Plugins may add commands: miles plugins list --kind command",
)
@click.option(
    "-p",
    "disable",
    metavar="no:NAME",
    multiple=True,
    expose_value=False,
    is_eager=True,
    callback=_disable,
    help="Do not load the plugin NAME (* for all but miles-core). May be repeated.",
)
@click.version_option(__version__, message=f"miles %(version)s (plugin API {PLUGIN_API})")
def cli() -> None:
    """Miles trains large language models with reinforcement learning."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 for a failed run, 2 for bad input, 130 for Ctrl-C."""
    try:
        result = cli.main(args, prog_name="miles", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UserError as error:
        if isinstance(error, PluginError):
            _show_trace(error)
        _complain(str(error))
        return 2
    except RunError as error:
        if error.cause:
            click.echo(error.cause, err=True)
        _complain(error.message)
        return 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _complain(f"cannot write {error.filename or 'a file'}: {error.strerror}")
        return 1
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted")
        return 130
    return result if isinstance(result, int) else 0


def _show_trace(error: PluginError) -> None:
    if error.trace is not None:
        click.echo(error.trace, err=True)
    elif error.__cause__ is not None:
        from miles_core.plugins import plugin_traceback

        click.echo(plugin_traceback(error.__cause__), err=True)


def _complain(message: str) -> None:
    click.echo(click.style("Error: ", fg="red", bold=True) + message, err=True)
