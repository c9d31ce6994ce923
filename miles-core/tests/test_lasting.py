import gc
import subprocess
import sys

import pytest

from miles_core.lasting import lasting_imports

IN_A_PROCESS = """
import gc
from miles_core.lasting import lasting_imports
runs = []
gc.callbacks.append(lambda phase, info: runs.append(phase))
with lasting_imports():
    {body}
    lists = [[] for _ in range(100_000)]
    looked = len(runs)
print(looked, gc.isenabled(), gc.get_freeze_count() > 0)
"""


@pytest.mark.parametrize(("body", "frozen"), [("import xml.dom.minidom", True), ("pass", False)])
def test_no_garbage_is_looked_for_while_modules_are_imported_nor_among_them_later(body: str, frozen: bool) -> None:
    command = [sys.executable, "-c", IN_A_PROCESS.format(body=body)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"0 True {frozen}\n"


def test_an_error_turns_the_collector_on_again() -> None:
    with pytest.raises(ImportError), lasting_imports():
        raise ImportError
    assert gc.isenabled()
