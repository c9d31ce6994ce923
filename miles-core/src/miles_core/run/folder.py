"""The folder of a run: what it begins with, from which its plan is read again, and while a process works in it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from miles_core.config.layers import RunSource, read_run_file
from miles_core.config.schema import Plan
from miles_core.config.source import toml_text
from miles_core.errors import UserError
from miles_core.plugins import CORE, Catalog, discover
from miles_core.run import checkpoint
from miles_core.run.plan import plan_of
from miles_core.run.trackers import METRICS_FILE

RUN_FILE = "run.toml"
MANIFEST = "manifest.json"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else works in the folder meanwhile. Raises `UserError` if somebody does.

    The lock is the kernel's, so it ends with the process, however that ends.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run {folder} is going on in another process; wait for its end, or stop it") from None
        yield


@contextlib.contextmanager
def removed_if_refused(folder: Path) -> Iterator[None]:
    """Removes a new run's folder again when bad input ends the run before it has done anything: the same command shall
    work once the input is mended."""
    try:
        yield
    except UserError:
        metrics = folder / METRICS_FILE
        if not checkpoint.all_of(folder) and not (metrics.is_file() and metrics.stat().st_size):
            shutil.rmtree(folder, ignore_errors=True)
        raise


# ---- What it begins with -----------------------------------------------------------------------------------------


def claim(plan: Plan) -> bool:
    """Makes the run folder, which is then this process's alone; False if another was quicker with a name that the user
    has not said. Raises `UserError` if a folder of the name that was said is there, or if none can be made."""
    with writing(plan.folder):
        try:
            plan.folder.mkdir(parents=True)
        except FileExistsError:
            if plan.origins["name"] == "default" and plan.folder.exists():
                return False
            raise UserError(
                f"run folder {plan.folder} exists already; choose another name (name=…), or go on with that run: "
                f"miles resume {plan.folder}"
            ) from None
    return True


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What is written before a run has begun: raises `UserError` where it cannot be."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the run folder {folder} cannot be made: {error.strerror or error}; set folder=… to where there is room"
        ) from error


def write_run_files(plan: Plan, folder: Path) -> None:
    """Writes the resolved run file and the manifest (plugins, versions, origins) that `load_plan` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(toml_text(plan.values), encoding="utf-8")
    text = json.dumps(_manifest(plan), indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _manifest(plan: Plan) -> dict[str, Any]:
    import platform

    from miles_core import PLUGIN_API

    return {
        "plugin_api": PLUGIN_API,
        "plugins": [list(plugin) for plugin in plan.plugin_set],
        "versions": {"python": platform.python_version(), **_versions("torch", "transformers", "ray", CORE)},
        "origins": dict(plan.origins),
        "directory": str(plan.directory),
    }


def _versions(*names: str) -> dict[str, str]:
    """Installed versions, without importing anything; what is not installed is left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load_plan(folder: Path, catalog: Catalog | None = None) -> Plan:
    """The plan of an existing run folder, equal to the one it was started with.

    Changes to the directory in which the run was started, if it is there, so that relative paths mean what they meant.
    Raises `UserError` if the folder holds no run, or if its plugins are not installed in the same versions.
    """
    folder = folder.absolute()
    manifest = _read_manifest(folder)
    doc = read_run_file(folder / RUN_FILE)
    with contextlib.suppress(OSError):
        os.chdir(manifest["directory"])
    if catalog is None:
        disabled = doc.plain().get("plugins", {}).get("disable", [])
        catalog = discover(disable=disabled)
    wanted = tuple(tuple(plugin) for plugin in manifest["plugins"])
    _check_plugins(folder, wanted, catalog)
    started_with = {name for name, _, _ in wanted}  # names mean what they meant, whatever was installed since
    catalog = Catalog(tuple(plugin for plugin in catalog.plugins if plugin.name in started_with))
    plan = plan_of(RunSource(doc=doc, name=folder.name), catalog)
    return dataclasses.replace(plan, folder=folder, origins=manifest["origins"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no run: there is no {MANIFEST} in it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / MANIFEST}:{error.lineno}: this is not valid JSON: {error.msg}") from None
    if not isinstance(manifest, dict) or not {"plugins", "origins", "directory"} <= manifest.keys():
        raise UserError(f"{folder / MANIFEST} is not what a run has written: begin it anew, from {folder / RUN_FILE}")
    return manifest


def _check_plugins(folder: Path, wanted: Sequence[tuple[str, ...]], catalog: Catalog) -> None:
    installed = {plugin.name: plugin.version for plugin in catalog.plugins if plugin.status == "active"}
    for name, version, _ in wanted:
        if installed.get(name) != version:
            found = f"{installed[name]} is installed" if name in installed else "it is not active here"
            raise UserError(
                f"run {folder} was started with {name} {version}, but {found}; pip install {name}=={version}"
            )
