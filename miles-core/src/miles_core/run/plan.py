"""The plan: a run file with every name resolved and every value checked, before a process is started.

`make_plan` reads the layers, builds core's sections and the options of every component, finds the weight sync, and
checks what the components say they need (`miles_core.config.traits`). A plan can be written as a run file that gives
the same plan again, which is how a run is resumed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from miles_core.config import schema, traits
from miles_core.config.build import build, plain
from miles_core.config.components import Built, as_table, build_component, build_options, completed
from miles_core.config.layers import RunSource, check_effect, read_run, read_run_file
from miles_core.config.model import find_family, read_config
from miles_core.config.source import Key, Node, dotted, item_name, merge, toml_text
from miles_core.errors import UserError, nearest
from miles_core.plugins import CORE, Catalog, discover, normalised
from miles_core.sample import Sampling
from miles_core.specs import (
    AdvantageSpec,
    CallbackSpec,
    DataSourceSpec,
    EngineSpec,
    FilterSpec,
    LossSpec,
    RewardSpec,
    RolloutSpec,
    Spec,
    TrackerSpec,
    TrainerSpec,
    WeightSyncSpec,
)

STAGE_KEYS = ("schedule", "sampling", "data", "rollout", "reward", "filters", "advantage", "loss", "trainer")
"""What a stage may set for itself, over what is set for all stages."""

RUN_KEYS = (
    "name", "folder", "seed", "model", "engine", "trainer", "evaluation", "checkpoint", "publish", "cluster",
    "plugins", "callbacks", "trackers", "stages",
)  # fmt: skip
"""What is the same for the whole run."""

DEFAULT_ROLLOUT = "single-turn"
DEFAULT_STAGE = "train"
RUN_FILE = "run.toml"
MANIFEST = "manifest.json"

T = TypeVar("T")


def make_plan(target: str, overrides: Sequence[str], catalog: Catalog) -> schema.Plan:
    """The plan of a run file or a recipe, with `key.key=value` flags over it.

    Runs on the driver; imports options modules and model families, nothing heavy. Raises `UserError`.
    """
    return _Planner(read_run(target, overrides, catalog), catalog).plan()


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The keys of a run file that stand in no section."""

    name: str
    folder: str = "runs"
    seed: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ValueError(f"name must be made of letters, digits and any of _ . + -, got {self.name!r}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def parent(self) -> Path:
        return Path(self.folder).expanduser().absolute()


class _Planner:
    """Builds one plan. `tree` gathers the resolved run file with its origins, in the order it is to be read."""

    def __init__(self, source: RunSource, catalog: Catalog) -> None:
        self.source = source
        self.doc = source.doc
        self.catalog = catalog
        self.tree: dict[str, Node] = {}

    def plan(self) -> schema.Plan:
        _check_keys(self.doc, (), (*RUN_KEYS, *STAGE_KEYS))
        run = self._run()
        model = self._section("model", schema.ModelSection)
        trainer = self._trainer()
        engine = self._engine()
        evaluation = self._section("evaluation", schema.EvaluationSection)
        checkpoint = self._section("checkpoint", schema.CheckpointSection)
        publish = self._section("publish", schema.PublishSection)
        cluster = self._section("cluster", schema.ClusterSection)
        plugins = self._section("plugins", schema.PluginsSection)
        callbacks = self._list("callbacks", CallbackSpec)
        trackers = self._list("trackers", TrackerSpec)
        stages = self._stages(trainer)
        if engine is None:
            _check_no_engine_needed(stages, self.doc.origin)
        check_effect(self.source, self._effective(), [stage.name for stage in stages if "stages" in self.tree])
        tree = Node(self.tree, self.doc.origin)
        plan = schema.Plan(
            name=run.name,
            folder=run.parent / run.name,
            seed=run.seed,
            model=model,
            engine=engine.component if engine else None,
            engine_section=engine.section if engine else None,
            trainer=trainer.component,
            trainer_section=trainer.section,
            sync=None,
            evaluation=evaluation,
            checkpoint=checkpoint,
            publish=publish,
            cluster=cluster,
            stages=stages,
            callbacks=callbacks,
            trackers=trackers,
            plugin_set=(),
            values=tree.plain(),
            origins=_origins(tree),
        )
        return self._finish(plan, plugins)

    def _finish(self, plan: schema.Plan, plugins: schema.PluginsSection) -> schema.Plan:
        """What depends on the components together: their checks, the weight sync, the plugins they come from."""
        config = read_config(plan.model, plan.origins, self.catalog)
        family = find_family(plan.model, config, self.catalog)
        traits.check(plan, config, family, self.catalog)
        sync = _find_sync(plan, self.catalog)
        plan = dataclasses.replace(plan, sync=sync)
        used = {component.plugin for component in _components(plan)} | ({family.plugin.name} if family else set())
        for name in sorted(used & {normalised(name) for name in plugins.disable}):
            raise UserError(f"{plan.origins['plugins.disable']}: plugin {name} is disabled, but this run uses it")
        return dataclasses.replace(plan, plugin_set=self.catalog.plugin_set([CORE, *sorted(used)]))

    # ---- Sections

    def _run(self) -> _Run:
        given = {key: self.doc.value[key] for key in ("name", "folder", "seed") if key in self.doc.value}
        if "name" not in given:
            given["name"] = Node(re.sub(r"[^\w.+-]+", "-", self.source.name).lstrip("-.+") or "run", "default")
        run = build(_Run, Node(given, self.doc.origin), ())
        if given["name"].origin == "default":
            run = dataclasses.replace(run, name=_free_name(run.parent, run.name))
        self.tree |= completed(plain(run), Node(given, self.doc.origin)).value
        return run

    def _section(self, key: str, cls: type[T]) -> T:
        given = self.doc.value.get(key)
        section = build(cls, given or Node({}, self.doc.origin), (key,))
        self.tree[key] = completed(plain(section), given)
        return section

    def _engine(self) -> Built | None:
        if "engine" not in self.doc.value:
            return None
        built = build_component(EngineSpec, self.doc.value["engine"], ("engine",), self.catalog, schema.EngineSection)
        self.tree["engine"] = built.node
        return built

    def _trainer(self) -> Built:
        table = self._required(self.doc, (), "trainer", TrainerSpec)
        built = build_component(TrainerSpec, table, ("trainer",), self.catalog, schema.TrainerSection)
        self.tree["trainer"] = built.node
        return built

    def _required(self, table: Node, at: Key, key: str, kind: type[Spec]) -> Node:
        if key in table.value:
            return table.value[key]  # type: ignore[no-any-return]
        known = ", ".join(entry.spec.name for entry in self.catalog.all(kind)) or "none is installed"
        raise UserError(
            f"{table.origin}: there is no {dotted((*at, key))}; add [{key}] with the name of a {kind.kind}. "
            f"Known: {known}."
        )

    def _list(self, key: str, kind: type[Spec]) -> tuple[schema.Component, ...]:
        built = self._build_list(self.doc.value.get(key), (key,), kind)
        self.tree[key] = Node([one.node for one in built], self._list_origin(self.doc, key))
        return tuple(one.component for one in built)

    def _list_origin(self, table: Node, key: str) -> str:
        return table.value[key].origin if key in table.value else "default"

    def _build_list(
        self, node: Node | None, at: Key, kind: type[Spec], section: type[Any] | None = None
    ) -> list[Built]:
        if node is None:
            return []
        if not isinstance(node.value, list):
            raise UserError(f'{node.origin}: {dotted(at)} must be a list, as in {dotted(at)} = ["name"]')
        extra = {} if section is None else {"section": section}
        return [
            build_component(kind, item, (*at, index), self.catalog, **extra) for index, item in enumerate(node.value)
        ]

    # ---- Stages

    def _stages(self, trainer: Built) -> tuple[schema.Stage, ...]:
        shared = self._shared()
        given = self.doc.value.get("stages")
        if given is None:
            stage, tree = self._stage(DEFAULT_STAGE, shared, (), 0, trainer)
            self.tree |= {**tree, "trainer": self.tree["trainer"]}
            return (stage,)
        stages: list[schema.Stage] = []
        trees: list[Node] = []
        for table in _stage_tables(given):
            name = str(item_name(table))
            own = Node({key: node for key, node in table.value.items() if key != "name"}, table.origin)
            first = stages[-1].last_step if stages else 0
            stage, tree = self._stage(name, merge(shared, own), ("stages", name), first, trainer)
            stages.append(stage)
            trees.append(Node({"name": table.value["name"], **tree}, table.origin))
        self.tree["stages"] = Node(trees, given.origin)
        return tuple(stages)

    def _shared(self) -> Node:
        """What every stage begins with."""
        shared = {key: as_table(node) for key, node in self.doc.value.items() if key in STAGE_KEYS}
        rollout = shared.get("rollout", Node({}, "default"))
        if isinstance(rollout.value, dict):
            shared["rollout"] = Node({"name": Node(DEFAULT_ROLLOUT, "default"), **rollout.value}, rollout.origin)
        own = {field.name for field in dataclasses.fields(schema.TrainerSection)}
        options = {key: node for key, node in shared["trainer"].value.items() if key not in own}
        shared["trainer"] = Node(options, shared["trainer"].origin)
        return Node(shared, self.doc.origin)

    def _stage(
        self, name: str, table: Node, at: Key, first_step: int, trainer: Built
    ) -> tuple[schema.Stage, dict[str, Node]]:
        def component(key: str, kind: type[Spec], **section: Any) -> Built:
            return build_component(kind, self._required(table, at, key, kind), (*at, key), self.catalog, **section)

        schedule, schedule_tree = _stage_section(table, at, "schedule", schema.Schedule)
        sampling, sampling_tree = _stage_section(table, at, "sampling", Sampling)
        data = component("data", DataSourceSpec)
        rollout = component("rollout", RolloutSpec)
        loss = component("loss", LossSpec, section=schema.LossSection)
        rewards = self._build_list(
            _listed(table.value.get("reward")), (*at, "reward"), RewardSpec, schema.RewardSection
        )
        filters = self._build_list(table.value.get("filters"), (*at, "filters"), FilterSpec)
        stage_trainer = _stage_trainer(trainer, table.value["trainer"], (*at, "trainer"))
        advantage = component("advantage", AdvantageSpec) if "advantage" in table.value else None
        if not traits.reads_advantage(loss.component, stage_trainer):
            advantage = None
        tree = {
            "schedule": schedule_tree,
            "sampling": sampling_tree,
            "data": data.node,
            "rollout": rollout.node,
            "reward": Node([one.node for one in rewards], self._list_origin(table, "reward")),
            "filters": Node([one.node for one in filters], self._list_origin(table, "filters")),
            **({"advantage": advantage.node} if advantage else {}),
            "loss": loss.node,
            "trainer": completed(plain(stage_trainer.options) or {}, table.value["trainer"]),
        }
        stage = schema.Stage(
            name=name,
            first_step=first_step,
            schedule=schedule,
            sampling=sampling,
            data=data.component,
            rollout=rollout.component,
            rewards=tuple((one.component, one.section) for one in rewards),
            filters=tuple(one.component for one in filters),
            advantage=advantage.component if advantage else None,
            loss=loss.component,
            loss_section=loss.section,
            trainer=stage_trainer,
        )
        return stage, tree

    def _effective(self) -> Node:
        """The resolved run without the trainer options that the stages share; each stage repeats those that hold."""
        tree = dict(self.tree)
        if "stages" in tree:
            own = {field.name for field in dataclasses.fields(schema.TrainerSection)}
            kept = {key: node for key, node in tree["trainer"].value.items() if key in own}
            tree["trainer"] = Node(kept, tree["trainer"].origin)
        return Node(tree, self.doc.origin)


def _check_keys(table: Node, at: Key, known: Sequence[str]) -> None:
    for key, node in table.value.items():
        if key in known:
            continue
        if at and key in RUN_KEYS:
            raise UserError(f"{node.origin}: {dotted((*at, key))} cannot be set: {key} is the same for all stages")
        where = f"{dotted(at)} has no key" if at else "a run file has no key"
        raise UserError(f"{node.origin}: {where} {key!r}. {nearest(key, known)}")


def _stage_tables(given: Node) -> list[Node]:
    """The stages, with names that flags can address."""
    if not isinstance(given.value, list) or not given.value:
        raise UserError(f"{given.origin}: stages must be tables that begin with [[stages]], at least one")
    names: list[str] = []
    for table in given.value:
        name = item_name(table) if isinstance(table.value, dict) else None
        if name is None or not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise UserError(f'{table.origin}: a stage needs a name that begins with a letter, as in name = "warm-up"')
        if name in names:
            raise UserError(f"{table.origin}: there is a stage {name!r} already; give this one another name")
        names.append(name)
        _check_keys(table, ("stages", name), ("name", *STAGE_KEYS))
        _check_stage_trainer(table, name)
    return list(given.value)


def _check_stage_trainer(table: Node, name: str) -> None:
    given = table.value.get("trainer")
    for field in dataclasses.fields(schema.TrainerSection):
        if given is not None and isinstance(given.value, dict) and field.name in given.value:
            raise UserError(
                f"{given.value[field.name].origin}: stages.{name}.trainer.{field.name} cannot be set: it is the same "
                f"for all stages; set trainer.{field.name}"
            )


def _stage_section(table: Node, at: Key, key: str, cls: type[T]) -> tuple[T, Node]:
    given = table.value.get(key)
    section = build(cls, given or Node({}, table.origin), (*at, key))
    return section, completed(plain(section), given)


def _stage_trainer(trainer: Built, options: Node, at: Key) -> schema.Component:
    spec = trainer.component.spec
    return dataclasses.replace(trainer.component, options=build_options(spec, options, at))


def _listed(node: Node | None) -> Node | None:
    """One reward is short for a list of one."""
    if node is None or isinstance(node.value, list):
        return node
    return Node([node], node.origin)


def _free_name(parent: Path, name: str) -> str:
    """`name`, or the first of name-2, name-3, … that has no folder yet."""
    free, number = name, 1
    while (parent / free).exists():
        number += 1
        free = f"{name}-{number}"
    return free


def _check_no_engine_needed(stages: Sequence[schema.Stage], origin: str) -> None:
    for stage in stages:
        assert isinstance(stage.rollout.spec, RolloutSpec)
        if stage.rollout.spec.engine:
            raise UserError(
                f"{origin}: rollout {stage.rollout.spec.name!r} of stage {stage.name!r} generates, but there is no "
                "engine; add [engine] with a name"
            )


def _find_sync(plan: schema.Plan, catalog: Catalog) -> schema.Component | None:
    """The weight sync of the run's trainer and engine."""
    if plan.engine is None:
        return None
    entries = catalog.all(WeightSyncSpec)
    for entry in entries:
        if (entry.spec.trainer, entry.spec.engine) == (plan.trainer.spec.name, plan.engine.spec.name):
            return schema.Component(spec=entry.spec, plugin=entry.plugin.name)
    pairs = ", ".join(f"{entry.spec.trainer} -> {entry.spec.engine}" for entry in entries) or "none"
    raise UserError(
        f"{plan.origins['engine.name']}: no weight sync goes from trainer {plan.trainer.spec.name!r} to engine "
        f"{plan.engine.spec.name!r}; installed pairs: {pairs}. Choose such a pair, or install a plugin that serves it"
    )


def _components(plan: schema.Plan) -> list[schema.Component]:
    """Every component of a plan."""
    whole = [plan.engine, plan.trainer, plan.sync, *plan.callbacks, *plan.trackers]
    for stage in plan.stages:
        whole += [stage.data, stage.rollout, stage.advantage, stage.loss, *stage.filters]
        whole += [reward for reward, _ in stage.rewards]
    return [component for component in whole if component is not None]


def _origins(tree: Node) -> dict[str, str]:
    """Dotted name -> origin; stages go by their names, as in flags."""
    names = [item_name(stage) for stage in tree.value["stages"].value] if "stages" in tree.value else []

    def name(path: Key) -> str:
        return dotted((path[0], str(names[int(path[1])]), *path[2:]) if path[0] == "stages" else path)

    return {name(path): node.origin for path, node in tree.leaves()}


# ---- Run folders --------------------------------------------------------------------------------------------------


def check_folder(plan: schema.Plan) -> None:
    """Refuses a run folder that exists, before anything is written. Raises `UserError`."""
    if plan.folder.exists():
        raise UserError(
            f"run folder {plan.folder} exists already; choose another name (name=…), or go on with that run: "
            f"miles resume {plan.folder}"
        )


def write_run_files(plan: schema.Plan, folder: Path) -> None:
    """Writes the resolved run file and the manifest (plugins, versions, origins) that `load_plan` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(toml_text(plan.values), encoding="utf-8")
    text = json.dumps(_manifest(plan), indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _manifest(plan: schema.Plan) -> dict[str, Any]:
    import platform

    from miles_core import PLUGIN_API

    return {
        "plugin_api": PLUGIN_API,
        "plugins": [list(plugin) for plugin in plan.plugin_set],
        "versions": {"python": platform.python_version(), **_versions("torch", "transformers", "ray", CORE)},
        "origins": dict(plan.origins),
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


def load_plan(folder: Path, catalog: Catalog | None = None) -> schema.Plan:
    """The plan of an existing run folder, equal to the one it was started with.

    Raises `UserError` if the folder holds no run, or if its plugins are not installed in the same versions.
    """
    folder = folder.absolute()
    manifest = _read_manifest(folder)
    doc = read_run_file(folder / RUN_FILE)
    if catalog is None:
        disabled = doc.plain().get("plugins", {}).get("disable", [])
        catalog = discover(disable=disabled)
    wanted = tuple(tuple(plugin) for plugin in manifest["plugins"])
    _check_plugins(folder, wanted, catalog)
    plan = _Planner(RunSource(doc=doc, name=folder.name), catalog).plan()
    return dataclasses.replace(plan, folder=folder, origins=manifest["origins"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no run: there is no {MANIFEST} in it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / MANIFEST}:{error.lineno}: this is not valid JSON: {error.msg}") from None
    return manifest


def _check_plugins(folder: Path, wanted: Sequence[tuple[str, ...]], catalog: Catalog) -> None:
    installed = {plugin.name: plugin.version for plugin in catalog.plugins if plugin.status == "active"}
    for name, version, _ in wanted:
        if installed.get(name) != version:
            found = f"{installed[name]} is installed" if name in installed else "it is not active here"
            raise UserError(
                f"run {folder} was started with {name} {version}, but {found}; pip install {name}=={version}"
            )
