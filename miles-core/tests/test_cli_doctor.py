"""`miles doctor`, on plugins that say what they need as extras, and with a driver's command that is made up."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from miles_core import installation

BODY = """
@hookimpl
def miles_engines():
    yield EngineSpec(name="e", ref="acme_gpu_parts:E", extra="serve", gpu_extra="fast", summary="s")

@hookimpl
def miles_recipes():
    yield RecipeSpec(name="r", ref="acme_gpu:r.toml", requires=("acme-gpu", "acme-absent>=2"), summary="s")
"""

METADATA = """Provides-Extra: serve
Provides-Extra: fast
Provides-Extra: unused
Requires-Dist: click>=8
Requires-Dist: click>=99; extra == "serve"
Requires-Dist: acme-serve==1.5; python_version > "3" and extra == "serve"
Requires-Dist: acme-never; python_version < "3" and extra == "serve"
Requires-Dist: acme-gpu[serve]; extra == "fast"
Requires-Dist: acme-kernels[cu13]==2.0; extra == "fast"
Requires-Dist: acme-unused; extra == "unused"
"""

RUN = """
model = { path = "acme/m" }
engine = { name = "e", gpus = 2 }
trainer = { name = "t", gpus = 1 }
"""

SMI = """#!{python}
print("NVIDIA H200, 143771 MiB, 580.1")
"""


@pytest.fixture
def acme(site: Any) -> Any:
    """A plugin whose engine needs one extra, and another on GPUs."""
    site.install("acme-gpu", BODY)
    with (site.folder / "acme_gpu-1.0.dist-info/METADATA").open("a") as file:
        file.write(METADATA)
    (site.folder / "run.toml").write_text(RUN)
    return site


def doctor(site: Any, *args: str, gpus: str = "") -> tuple[int, dict[str, Any]]:
    """Exit code, and what `--json` says. gpus: the text of an nvidia-smi; without one there is none."""
    programs = site.folder / "bin"
    programs.mkdir(exist_ok=True)
    if gpus:
        (programs / "nvidia-smi").write_text(gpus.format(python=sys.executable))
        (programs / "nvidia-smi").chmod(0o755)
    done = site.run("doctor", *args, "--json", PATH=str(programs), MILES_DISABLE_PLUGINS="")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_extras_are_listed_with_what_is_installed_of_them(acme: Any) -> None:
    code, said = doctor(acme)
    assert code == 0  # nobody asked for what is missing
    serve, fast = said["extras"]["acme-gpu[serve]"], said["extras"]["acme-gpu[fast]"]
    assert [need["requirement"] for need in serve] == ["click>=99", "acme-serve==1.5"]
    assert [(need["found"] is None, need["good"]) for need in serve] == [(False, False), (True, False)]
    assert [need["requirement"] for need in fast] == ["click>=99", "acme-serve==1.5", "acme-kernels[cu13]==2.0"]
    assert said["machine"]["gpus"] == []
    assert "missing" not in said


def test_a_run_lacks_the_extras_of_what_it_names_and_gpus(acme: Any) -> None:
    code, said = doctor(acme, str(acme.folder / "run.toml"), gpus=SMI)
    assert code == 1
    assert said["machine"]["gpus"] == [{"name": "NVIDIA H200", "memory": "143771 MiB", "driver": "580.1"}]
    told = "\n".join(one["what"] for one in said["missing"])
    assert "engine 'e' needs acme-serve==1.5 (acme-gpu[serve]), which is not installed" in told
    assert "engine 'e' needs acme-kernels[cu13]==2.0 (acme-gpu[fast]), which is not installed" in told
    assert "click>=99" in told
    assert "trainer: unknown trainer 't'" in told
    assert "the run asks for 3 GPUs, this machine has 1" in told
    assert "unused" not in told
    assert said["install"] == "pip install 'acme-gpu[fast]' 'acme-gpu[serve]'"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["placement.layout=colocated"], "asks for 2 GPUs"),
        (["cluster.address=10.0.0.1:6379"], ""),
        (["engine.gpus=0", "trainer.gpus=0"], ""),
        (["engine.count=3"], "asks for 7 GPUs"),
    ],
)
def test_gpus_are_counted_as_they_are_placed(acme: Any, flags: list[str], told: str) -> None:
    _, said = doctor(acme, str(acme.folder / "run.toml"), *flags)
    asks = [one["what"] for one in said["missing"] if "GPUs" in one["what"]]
    assert bool(asks) == bool(told)
    assert told in "".join(asks)
    without = "engine.gpus=0" in flags
    assert any("acme-kernels" in one["what"] for one in said["missing"]) != without


def test_a_recipe_lacks_what_it_requires(acme: Any) -> None:
    (acme.folder / "acme_gpu").mkdir()
    (acme.folder / "acme_gpu.py").rename(acme.folder / "acme_gpu/__init__.py")
    (acme.folder / "acme_gpu/r.toml").write_text('recipe = "of-the-absent"\n')
    code, said = doctor(acme, "r")
    assert code == 1
    assert [one["install"] for one in said["missing"]] == ["acme-absent>=2"]


def test_a_run_that_lacks_no_package_but_cannot_be_planned_says_why(acme: Any) -> None:
    (acme.folder / "bad.toml").write_text("schedule = { steps = 1 }\n")
    done = acme.run("doctor", str(acme.folder / "bad.toml"))
    assert done.returncode == 1
    assert "model needs either `path` or `family`" in done.stdout
    assert "pip install" not in done.stdout


def test_a_file_that_is_not_there_is_bad_input(acme: Any) -> None:
    done = acme.run("doctor", "absent.toml")
    assert done.returncode == 2
    assert "there is no run file absent.toml" in done.stderr


def test_a_plugin_that_does_not_load_is_a_finding(acme: Any) -> None:
    acme.install("acme-bad", "raise RuntimeError('no')")
    done = acme.run("doctor")
    assert done.returncode == 1
    assert "acme-bad" in done.stdout


def test_the_command_imports_nothing_heavy(acme: Any) -> None:
    heavy = "{'torch', 'ray', 'transformers'} & {*sys.modules}"
    code = f"import atexit, sys; atexit.register(lambda: print('HEAVY', *{heavy}));"
    done = acme.run("doctor", str(acme.folder / "run.toml"), first=code)
    assert done.stdout.rstrip().endswith("HEAVY")


def test_the_cuda_that_torch_is_built_for_is_read_from_its_files(site: Any) -> None:
    (site.folder / "torch").mkdir()
    (site.folder / "torch/version.py").write_text("debug = False\ncuda: Optional[str] = '13.0'\nhip = None\n")
    info = site.folder / "torch-2.11.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    found = installation.machine()
    assert (found.torch, found.cuda) == ("2.11.0", "13.0")
    Path(site.folder, "torch/version.py").write_text("cuda: Optional[str] = None\n")
    assert installation.machine().cuda is None
