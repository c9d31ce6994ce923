"""What every command pays for: loading all plugins imports nothing but the standard library, pluggy and themselves.

Plugin modules and the modules of options are loaded in every process, `miles --help` included.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points

import pytest

ALLOWED = {"pluggy"}

_LOAD = """
import importlib, json, sys
before = set(sys.modules)
module = importlib.import_module(sys.argv[1])
hooks = [hook for hook in vars(module).values() if getattr(hook, "miles_impl", None)]
records = [record for hook in hooks for record in hook()]
for record in records:
    if record.options:
        importlib.import_module(record.options.partition(":")[0])
print(json.dumps([len(records), sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""

_HELP = """
import json, sys
from miles_core.cli.main import main
sys.argv = ["miles", "--help"]
try:
    main()
except SystemExit:
    pass
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def _last_line(script: str, *arguments: str) -> list[object]:
    """What the script prints last, as JSON, in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, list)
    return answer


@pytest.mark.parametrize("entry", sorted(entry_points(group="miles.plugins")), ids=lambda entry: entry.name)
def test_plugin_and_its_options_import_nothing_heavy(entry: EntryPoint) -> None:
    records, loaded = _last_line(_LOAD, entry.module)
    assert records, "the plugin declares nothing"
    assert isinstance(loaded, list)
    foreign = {name for name in loaded if not name.startswith("miles_")} - set(sys.stdlib_module_names)
    assert foreign <= ALLOWED


def test_help_imports_nothing_that_draws_or_computes() -> None:
    loaded = set(_last_line(_HELP))
    assert "miles_core" in loaded
    assert loaded.isdisjoint({"matplotlib", "numpy", "packaging", "ray", "rich", "torch", "transformers"})
