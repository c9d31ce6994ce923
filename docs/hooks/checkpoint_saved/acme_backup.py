"""Copies each checkpoint to where a disk failure does not reach it; here, for the example, to a folder beside."""

from collections.abc import Iterable

from miles_core import CallbackSpec, hookimpl


@hookimpl
def miles_callbacks() -> Iterable[CallbackSpec]:
    yield CallbackSpec(
        name="backup",
        ref="acme_backup:Backup",
        runs_on=frozenset({"driver"}),
        summary="backup/ in the run folder: a copy of the newest checkpoint",
    )


class Backup:
    def __init__(self, options: None) -> None: ...

    def checkpoint_saved(self, run, step, path) -> None:
        import shutil

        backup = run.folder / "backup"
        shutil.rmtree(backup, ignore_errors=True)
        shutil.copytree(path, backup)
