"""A run that the cluster has no room for is refused before anything is reserved, and it is said what to lower."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray

from miles_core.cluster.session import Place, Session
from miles_core.config.schema import ClusterSection
from miles_core.errors import UserError


def check(monkeypatch: pytest.MonkeyPatch, gpus: int, *machines: dict[str, float]) -> None:
    """Of a run with two engines that want so many GPUs each, on such a cluster and a machine that has left it."""
    nodes: list[dict[str, Any]] = [{"Alive": True, "Resources": machine} for machine in machines]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}])
    total = sum((Counter(machine) for machine in machines), Counter[str]())
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    places = {"engine 0": Place(cpus=1, gpus=gpus), "engine 1": Place(cpus=1, gpus=gpus), "collector": Place(cpus=1)}
    Session(ClusterSection(), places, Path("logs"))._check_resources()


EIGHT = {"CPU": 16.0, "GPU": 8.0}


def test_engines_may_be_on_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, 8, EIGHT, EIGHT)


def test_more_than_the_cluster_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the run needs 3 CPUs and 16 GPUs, but the cluster has 8 GPUs; lower engine"):
        check(monkeypatch, 8, EIGHT)


def test_one_engine_that_is_larger_than_a_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="engine 0 needs 1 CPUs and 12 GPUs of one machine, and none"):
        check(monkeypatch, 12, EIGHT, EIGHT, EIGHT)
