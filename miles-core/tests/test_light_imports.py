"""What the commands that must answer at once may import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"matplotlib", "megatron", "numpy", "ray", "rich", "sglang", "tokenizers", "torch", "transformers"}

AT_ONCE = {
    "import miles_core": HEAVY | {"click"},
    "import miles_core.plugins": HEAVY | {"click", "packaging"},
    "from miles_core.cli.main import main; main(['--help'])": HEAVY | {"packaging"},
    "from miles_core.cli.main import main; main(['--version'])": HEAVY | {"packaging"},
    "from miles_core.cli.main import main; main(['plugins', 'list'])": HEAVY,
    "from miles_core.cli.main import main; main(['plugins', 'info', 'miles-core'])": HEAVY,
}


@pytest.mark.parametrize("code", AT_ONCE)
def test_it_imports_nothing_heavy(code: str) -> None:
    report = "import json, sys; print(); print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert imported & AT_ONCE[code] == set()
    assert "miles_core" in imported


def test_help_loads_no_plugin() -> None:
    code = (
        "import sys; from miles_core.cli.main import main; main(['--help']); print('miles_core.plugins' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
