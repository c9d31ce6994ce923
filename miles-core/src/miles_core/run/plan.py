"""The plan: a run file with every name resolved and every value checked, before a process is started.

`make_plan` reads the layers, builds core's sections and the options of every component, finds the weight sync, and
checks what the components say they need (`miles_core.config.check_run`). A plan can be written as a run file that gives
the same plan again (`miles_core.run.folder`), which is how a run is resumed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from miles_core.config import schema
from miles_core.config.build import build, plain
from miles_core.config.check_run import check_run
from miles_core.config.components import Built, SectionReader, as_table, build_component, build_options, completed
from miles_core.config.layers import RunSource, check_effect, read_run
from miles_core.config.model import find_family, read_config
from miles_core.config.source import Key, Node, dotted, item_name, merge
from miles_core.config.teacher import check_teacher
from miles_core.config.traits import reads_advantage, reads_values
from miles_core.config.wording import critic_loss_line, reading_values, scoring
from miles_core.errors import UserError, nearest
from miles_core.plugins import CORE, Catalog, normalised
from miles_core.sample import Sampling
from miles_core.specs import (
    AdvantageSpec,
    CallbackSpec,
    CorrectionSpec,
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

STAGE_KEYS = (
    "schedule", "sampling", "data", "rollout", "reward", "filters", "advantage", "loss", "corrections", "trainer",
    "critic", "kl",
)  # fmt: skip
"""What a stage may set for itself, over what is set for all stages."""

RUN_KEYS = (
    "name", "folder", "seed", "model", "engine", "teacher", "trainer", "critic", "evaluation", "checkpoint", "publish",
    "placement", "cluster", "plugins", "callbacks", "trackers", "stages",
)  # fmt: skip
"""What is the same for the whole run."""

DEFAULT_ROLLOUT = "single-turn"
DEFAULT_STAGE = "train"

_OF_THE_RUN = {
    "trainer": frozenset(field.name for field in dataclasses.fields(schema.TrainerSection)),
    "critic": frozenset(field.name for field in dataclasses.fields(schema.CriticSection)) - {"warmup_steps"},
}
"""Keys of sections that a stage may change, which it may not."""


def make_plan(target: str, overrides: Sequence[str], catalog: Catalog) -> schema.Plan:
    """The plan of a run file or a recipe, with `key.key=value` flags over it.

    Runs on the driver; imports options modules and model families, nothing heavy. Raises `UserError`.
    """
    return plan_of(read_run(target, overrides, catalog), catalog)


def plan_of(source: RunSource, catalog: Catalog) -> schema.Plan:
    """The plan of what was said. Raises `UserError`."""
    return _Planner(source, catalog).plan()


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The keys of a run file that stand in no section."""

    name: str
    folder: str = "runs"
    seed: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ValueError(f"name must be made of letters, digits and any of _ . + -, got {self.name!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must not be negative, and below 2^63, got {self.seed}")

    @property
    def parent(self) -> Path:
        return Path(self.folder).expanduser().absolute()


class _Planner:
    """Builds one plan."""

    def __init__(self, source: RunSource, catalog: Catalog) -> None:
        self.source = source
        self.doc = source.doc
        self.catalog = catalog

    def plan(self) -> schema.Plan:
        _check_keys(self.doc, (), (*RUN_KEYS, *STAGE_KEYS))
        read = SectionReader(self.doc, (), self.catalog)
        run = self._run(read)
        model = read.section("model", schema.ModelSection)
        engine = read.optional("engine", EngineSpec, schema.EngineSection)
        trainer = read.component("trainer", TrainerSpec, schema.TrainerSection)
        evaluation = read.section("evaluation", schema.EvaluationSection)
        checkpoint = read.section("checkpoint", schema.CheckpointSection)
        publish = read.section("publish", schema.PublishSection)
        placement = read.section("placement", schema.PlacementSection)
        cluster = read.section("cluster", schema.ClusterSection)
        read.section("plugins", schema.PluginsSection)
        callbacks = read.components("callbacks", CallbackSpec)
        trackers = read.components("trackers", TrackerSpec)
        critic = self._critic(read)
        teacher = self._teacher(read)
        self.trainer, self.critic = trainer.component, critic.component if critic else None
        stages = self._stages(read)
        if self.critic is not None and all(stage.critic is None for stage in stages):
            raise UserError(
                f"{self.doc.value['critic'].origin}: there is a critic, but no advantage reads its values; remove "
                f"[critic], or choose an advantage that reads them ({reading_values(self.catalog)})"
            )
        tree = Node(read.tree, self.doc.origin)
        check_effect(self.source, _effective(tree), [stage.name for stage in stages if "stages" in read.tree])
        plan = schema.Plan(
            name=run.name,
            folder=run.parent / run.name,
            seed=run.seed,
            model=model,
            engine=engine.component if engine else None,
            engine_section=engine.section if engine else None,
            trainer=trainer.component,
            trainer_section=trainer.section,
            critic=self.critic,
            critic_section=critic.section if critic else None,
            teacher=teacher,
            sync=None,
            evaluation=evaluation,
            checkpoint=checkpoint,
            publish=publish,
            placement=placement,
            cluster=cluster,
            stages=stages,
            callbacks=tuple(one.component for one in callbacks),
            trackers=tuple(one.component for one in trackers),
            plugin_set=(),
            values=tree.plain(),
            origins={dotted(path): node.origin for path, node in named_leaves(tree)},
        )
        return self._finish(plan)

    def _finish(self, plan: schema.Plan) -> schema.Plan:
        """What depends on the components together: their checks, the weight sync, the plugins they come from."""
        config = read_config(plan.model, plan.origins, self.catalog)
        family = find_family(plan.model, config, plan.origins, self.catalog)
        check_run(plan, config, family, self.catalog)
        check_teacher(plan, self.catalog)
        plan = dataclasses.replace(plan, sync=_find_sync(plan, self.catalog))
        used = {component.plugin for component in _components(plan)} | ({family.plugin.name} if family else set())
        for name in sorted(used & {normalised(name) for name in plan.values["plugins"]["disable"]}):
            raise UserError(f"{plan.origins['plugins.disable']}: plugin {name} is disabled, but this run uses it")
        return dataclasses.replace(plan, plugin_set=self.catalog.plugin_set([CORE, *sorted(used)]))

    def _run(self, read: SectionReader) -> _Run:
        given = {key: self.doc.value[key] for key in ("name", "folder", "seed") if key in self.doc.value}
        if "name" not in given:
            given["name"] = Node(re.sub(r"[^\w.+-]+", "-", self.source.name).lstrip("-.+") or "run", "default")
        run = build(_Run, Node(given, self.doc.origin), ())
        if "name" not in self.doc.value:
            run = dataclasses.replace(run, name=_free_name(run.parent, run.name))
        read.tree |= completed(plain(run), Node(given, self.doc.origin)).value
        return run

    def _critic(self, read: SectionReader) -> Built[TrainerSpec] | None:
        """The run's critic, with the options that the stages share."""
        if "critic" not in self.doc.value:
            return None
        table = _over_trainer(as_table(self.doc.value["trainer"]), as_table(self.doc.value["critic"]))
        options = Node({key: node for key, node in table.value.items() if key != "loss"}, table.origin)
        built = build_component(TrainerSpec, options, ("critic",), self.catalog, schema.CriticSection)
        read.tree["critic"] = built.node
        return built

    def _teacher(self, read: SectionReader) -> schema.Teacher | None:
        """The run's teacher."""
        given = self.doc.value.get("teacher")
        if given is None:
            return None
        own = given
        if isinstance(given.value, dict):
            own = Node({key: node for key, node in given.value.items() if key != "engine"}, given.origin)
        section = build(schema.TeacherSection, own, ("teacher",))
        if "engine" not in given.value:
            raise UserError(
                f"{given.origin}: teacher.engine is missing; add it with the name of an engine that scores "
                f"({scoring(self.catalog)})"
            )
        served = SectionReader(given, ("teacher",), self.catalog)
        engine = served.component("engine", EngineSpec, schema.EngineSection)
        read.tree["teacher"] = Node({**completed(plain(section), own).value, **served.tree}, given.origin)
        return schema.Teacher(section=section, engine=engine.component, engine_section=engine.section)

    def _stages(self, read: SectionReader) -> tuple[schema.Stage, ...]:
        shared = self._shared()
        given = self.doc.value.get("stages")
        if given is None:
            stage, tree = self._stage(DEFAULT_STAGE, shared, (), 0)
            for key in _OF_THE_RUN.keys() & tree.keys():
                tree[key] = Node({**read.tree[key].value, **tree[key].value}, read.tree[key].origin)
            read.tree |= tree
            return (stage,)
        stages: list[schema.Stage] = []
        trees: list[Node] = []
        for name, table in _stage_tables(given).items():
            own = Node({key: node for key, node in table.value.items() if key != "name"}, table.origin)
            first = stages[-1].last_step if stages else 0
            stage, tree = self._stage(name, merge(shared, own), ("stages", name), first)
            stages.append(stage)
            trees.append(Node({"name": table.value["name"], **tree}, table.origin))
        read.tree["stages"] = Node(trees, given.origin)
        return tuple(stages)

    def _shared(self) -> Node:
        """What every stage begins with."""
        shared = {key: as_table(node) for key, node in self.doc.value.items() if key in STAGE_KEYS}
        rollout = shared.get("rollout", Node({}, "default"))
        if isinstance(rollout.value, dict):
            shared["rollout"] = Node({"name": Node(DEFAULT_ROLLOUT, "default"), **rollout.value}, rollout.origin)
        for key in _OF_THE_RUN.keys() & shared.keys():
            options = {name: node for name, node in shared[key].value.items() if name not in _OF_THE_RUN[key]}
            shared[key] = Node(options, shared[key].origin)
        return Node(shared, self.doc.origin)

    def _stage(self, name: str, table: Node, at: Key, first_step: int) -> tuple[schema.Stage, dict[str, Node]]:
        """A stage, and its part of the resolved run file."""
        read = SectionReader(table, at, self.catalog)
        schedule = read.section("schedule", schema.Schedule)
        sampling = read.section("sampling", Sampling)
        data = read.component("data", DataSourceSpec)
        rollout = read.component("rollout", RolloutSpec)
        rewards = read.components("reward", RewardSpec, schema.RewardSection)
        filters = read.components("filters", FilterSpec)
        advantage = read.optional("advantage", AdvantageSpec)
        loss = read.component("loss", LossSpec, schema.LossSection)
        kl = read.section("kl", schema.KLSection)
        corrections = [one.component for one in read.components("corrections", CorrectionSpec)]
        options = build_options(self.trainer.spec, table.value["trainer"], (*at, "trainer"))
        trainer = dataclasses.replace(self.trainer, options=options)
        read.tree["trainer"] = completed(plain(trainer.options) or {}, table.value["trainer"])
        if not rollout.component.spec.engine:
            corrections = []
            read.tree["corrections"] = Node([], read.tree["corrections"].origin)
        if advantage is not None and not reads_advantage([loss.component, *corrections], trainer):
            advantage = None
            del read.tree["advantage"]
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
            corrections=tuple(corrections),
            trainer=trainer,
            kl=kl,
            critic=self._stage_critic(read) if advantage and reads_values(advantage.component) else None,
        )
        return stage, read.tree

    def _stage_critic(self, read: SectionReader) -> schema.StageCritic | None:
        """The critic in a stage whose advantage reads values."""
        if self.critic is None:
            return None
        at, table = (*read.at, "critic"), read.table.value["critic"]
        said = table.origin
        if self.critic.spec == self.trainer.spec:
            table = merge(read.table.value["trainer"], table, ("critic",))
        of_loss = SectionReader(table, at, self.catalog)
        loss = of_loss.optional("loss", LossSpec)
        if loss is None:
            raise UserError(f"{said}: {dotted(at)} has no loss; add {critic_loss_line(self.catalog)}")
        name = Node(f"{self.critic.plugin}:{self.critic.spec.name}", table.origin)
        others = {key: node for key, node in table.value.items() if key != "loss"}
        built = build_component(
            TrainerSpec, Node({**others, "name": name}, table.origin), at, self.catalog, schema.CriticSection
        )
        kept = {key: node for key, node in built.node.value.items() if key not in _OF_THE_RUN["critic"]}
        read.tree["critic"] = Node({**kept, **of_loss.tree}, table.origin)
        return schema.StageCritic(trainer=built.component, loss=loss.component, warmup_steps=built.section.warmup_steps)


def _over_trainer(trainer: Node, critic: Node) -> Node:
    """`[critic]` over what it takes from `[trainer]`, unless another trainer trains it."""
    taken = {key: node for key, node in trainer.value.items() if key == "name" or key not in _OF_THE_RUN["trainer"]}
    return merge(Node(taken, critic.origin), critic, ("critic",))


def _effective(tree: Node) -> Node:
    """The resolved run without the trainer options that the stages share; each stage repeats those that hold."""
    if "stages" not in tree.value:
        return tree
    kept = {}
    for key in _OF_THE_RUN.keys() & tree.value.keys():
        section = tree.value[key]
        own = {name: node for name, node in section.value.items() if name in _OF_THE_RUN[key]}
        kept[key] = Node(own, section.origin)
    return Node({**tree.value, **kept}, tree.origin)


def _check_keys(table: Node, at: Key, known: Sequence[str]) -> None:
    for key, node in table.value.items():
        if key in known:
            continue
        if at and key in RUN_KEYS:
            raise UserError(f"{node.origin}: {dotted((*at, key))} cannot be set: {key} is the same for all stages")
        where = f"{dotted(at)} has no key" if at else "a run file has no key"
        raise UserError(f"{node.origin}: {where} {key!r}. {nearest(key, known)}")


def _stage_tables(given: Node) -> dict[str, Node]:
    """The stages by their names, which flags can address."""
    if not isinstance(given.value, list) or not given.value:
        raise UserError(f"{given.origin}: stages must be tables that begin with [[stages]], at least one")
    stages: dict[str, Node] = {}
    for table in given.value:
        name = item_name(table) if isinstance(table.value, dict) else None
        if name is None or not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise UserError(f'{table.origin}: a stage needs a name that begins with a letter, as in name = "warm-up"')
        if name in stages:
            raise UserError(f"{table.origin}: there is a stage {name!r} already; give this one another name")
        stages[name] = table
        _check_keys(table, ("stages", name), ("name", *STAGE_KEYS))
        for section in _OF_THE_RUN:
            _check_section_of_stage(table, name, section)
    return stages


def _check_section_of_stage(table: Node, name: str, section: str) -> None:
    given = table.value.get(section, Node({}, ""))
    for key in given.value if isinstance(given.value, dict) else ():
        if key in _OF_THE_RUN[section]:
            raise UserError(
                f"{given.value[key].origin}: stages.{name}.{section}.{key} cannot be set: it is the same for all "
                f"stages; set {section}.{key}"
            )


def _free_name(parent: Path, name: str) -> str:
    """`name`, or the first of name-2, name-3, … that has no folder yet."""
    free, number = name, 1
    while (parent / free).exists():
        number += 1
        free = f"{name}-{number}"
    return free


def _find_sync(plan: schema.Plan, catalog: Catalog) -> schema.Component[WeightSyncSpec] | None:
    """The weight sync of the run's trainer and engine."""
    if plan.engine is None:
        return None
    entries, pair = catalog.all(WeightSyncSpec), (plan.trainer.spec.name, plan.engine.spec.name)
    layout = plan.placement.layout
    way = f"from trainer {pair[0]!r} to engine {pair[1]!r}" + (" where they are colocated" * (layout == "colocated"))
    serving = [
        entry for entry in entries if (entry.spec.trainer, entry.spec.engine) == pair and layout in entry.spec.layouts
    ]
    if plan.publish.sync is not None:
        origin = plan.origins["publish.sync"]
        try:
            entries = [catalog.get(WeightSyncSpec, plan.publish.sync)]
        except UserError as error:
            raise error.placed(f"{origin}: publish.sync") from error.__cause__
        serving = [entry for entry in serving if entry in entries]
        if not serving:
            raise UserError(f"{origin}: weight sync {plan.publish.sync!r} does not go {way}")
    sides = {plan.trainer.plugin, plan.engine.plugin}
    if len(serving) > 1 and len(own := [entry for entry in serving if entry.plugin.name in sides]) == 1:
        serving = own  # whoever else offers one: what is installed must not change a run
    if len(serving) > 1:
        names = " or ".join(f'"{entry.plugin.name}:{entry.spec.name}"' for entry in serving)
        raise UserError(
            f"{plan.origins['engine.name']}: {len(serving)} weight syncs go {way}. Say publish.sync = {names}."
        )
    if serving:
        return schema.Component(spec=serving[0].spec, plugin=serving[0].plugin.name)
    pairs = ", ".join(f"{entry.spec.trainer} -> {entry.spec.engine}" for entry in entries) or "none"
    message = f"{plan.origins['engine.name']}: no weight sync goes {way}; installed pairs: {pairs}. "
    message += "Choose such a pair, or install a plugin that serves it"
    raise UserError("\n".join([message, *catalog.not_loaded()]))


def _components(plan: schema.Plan) -> list[schema.Component[Spec]]:
    """Every component of a plan."""
    whole: list[schema.Component[Spec] | None] = [
        plan.engine,
        plan.trainer,
        plan.critic,
        plan.sync,
        *plan.callbacks,
        *plan.trackers,
    ]
    whole += [plan.teacher.engine] if plan.teacher else []
    for stage in plan.stages:
        whole += [stage.data, stage.rollout, stage.advantage, stage.loss, *stage.corrections, *stage.filters]
        whole += [reward for reward, _ in stage.rewards]
        whole += [stage.critic.loss] if stage.critic else []
    return [component for component in whole if component is not None]


def named_leaves(tree: Node) -> Iterator[tuple[Key, Node]]:
    """The leaves of a resolved run file; stages go by their names, as in flags."""
    names = [item_name(stage) for stage in tree.value["stages"].value] if "stages" in tree.value else []
    for path, node in tree.leaves():
        yield (path[0], str(names[int(path[1])]), *path[2:]) if path[0] == "stages" else path, node
