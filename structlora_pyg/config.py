"""Typed configuration of the adapters: a LoRA configuration with one of each stage.

Components never see these objects; `structlora_pyg.tuner.model` and `structlora_pyg.study.train` unpack them into plain
arguments. Every problem of a configuration is reported in one `ConfigError`, before any weight is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig

from structlora_pyg.checks import (
    ConfigError,
    Count,
    CountOrZero,
    Positive,
    Section,
    Share,
    build,
    fits_json,
    not_one_of,
    read,
    replace_file,
)
from structlora_pyg.stage_config import (
    PRESETS,
    CoordinatorConfig,
    EncodingConfig,
    FilterConfig,
    GraphConfig,
    Policy,
    Preset,
    ScheduleConfig,
)

CONFIG_FILE = "structlora_config.json"
OBJECTS = "objects"  # in that file: the settings whose values it cannot hold

INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva", "mica", "shared", "gradient")
REWRITING = ("pissa", "pissa_niter_[number]", "olora", "corda", "loftq", "lora_ga")  # the base weights, by PEFT

# What the graph pass carries of PEFT's LoRA: all that runs on a lora_A and a lora_B. Anything else that a version of
# PEFT knows (Arrow, QA-LoRA, Megatron, ...) has other factors, or none of its own.
CARRIED = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "trainable_token_indices", "use_dora", "layer_replication", "runtime_config",
    "lora_bias", "target_parameters", "ensure_weight_tying", "eva_config", "alora_invocation_tokens", "use_bdlora",
    "kasa_config", "monteclora_config", "velora_config", "loftq_config", "corda_config", "lora_ga_config",
}  # fmt: skip


@dataclass(kw_only=True)
class StructLoraConfig(LoraConfig, Section):
    """A `peft.LoraConfig` with a graph, a filter and a coordinator.

    All arguments of `peft.LoraConfig` are accepted and keep their meaning. `init_lora_weights` knows two more values:
    ``shared`` (one draw of lora_A for all adapters of a role and width) and ``gradient`` (top singular directions of
    the loss gradient; needs `train_step` in `get_structlora_model`).

    Args:
        r: Rank of every adapter, >= 1.
        lora_alpha: Scaling times rank; usually 2 r. PEFT's default is 8.
        target_modules: Names, or a regular expression, of the layers to adapt; ``all-linear``; default: what PEFT
            uses for the architecture.
        lora_dropout: Dropout before lora_A, in [0, 1).
        bias: Biases to train: ``none``, ``all``, ``lora_only``.
        modules_to_save: Modules to train and save as a whole, such as a new head.
        init_lora_weights: Start of lora_A: ``true`` (PEFT's), ``gaussian``, ``orthogonal``, ``shared``, ``gradient``,
            ``eva`` (call `peft.tuners.lora.initialize_lora_eva_weights` before training); ``false`` leaves both random.
            PEFT's starts that rewrite the base (``pissa``, ``olora``, ``corda``, ``loftq``, ``lora_ga``) are exported
            at their own ranks and scalings; noise and gates then act on what they took out of the base too.
        rank_pattern: Ranks by module name where they differ from `r`.
        fused_slices: Slices of a fused projection (``qkv``, ``c_attn``, torch's attention) to adapt, a subset of
            ``["q", "k", "v"]``; each slice is an adapter of rank r of its own. Default: the layer as a whole.
        preset: Defaults of the sections below. ``default``: noise on the rank codes, whose levels the coordinator
            decides. ``paper``: StructLoRA as arXiv 2603.14228 writes it down: a node per layer, Gumbel gates under both
            terms of the objective, a message added to the update at full strength.
        graph: See `GraphConfig`.
        encoding: See `EncodingConfig`.
        filter: See `FilterConfig`.
        coordinator: See `CoordinatorConfig`.
        stages: Stages of your own between filter and coordinator, ``Data -> Data`` modules: dotted paths, classes,
            mappings of ``name`` and arguments, or objects. A constructor gets what it asks for of ``channels`` (width
            of ``x``) and ``example`` (a graph).
        schedule: See `ScheduleConfig`.
        alarms: What happens when training silently goes wrong (a layer or a stage without gradient, an auxiliary loss
            that goes nowhere, all gates closed, no edges, codes that are not finite): ``warn``, ``error`` or ``off``.
        seed: Seed of sketches, gate noise and random edges, >= 0.

    Raises:
        ConfigError: With every problem found.
    """

    has_presets = True

    # PEFT's own annotation does not know our starts; its metadata says which of them are variants of LoRA.
    init_lora_weights: Any = field(default=True, metadata=LoraConfig.__dataclass_fields__["init_lora_weights"].metadata)
    fused_slices: list[str] | None = None
    preset: Preset = "default"
    graph: GraphConfig = field(default_factory=GraphConfig)
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    stages: list[Any] = field(default_factory=list)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    alarms: Policy = "warn"
    seed: CountOrZero = 0

    def __new__(cls, *args: Any, **values: Any) -> StructLoraConfig:
        """Refuse names that are no settings, with the nearest that is."""
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        if args:
            raise ConfigError([f"settings are given by name, as StructLoraConfig(r=8); got {args!r}"])
        if found := [f"{name}: unknown setting.{cls.hint(name)}" for name in values if name not in known]:
            raise ConfigError(found)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Build nested sections from mappings and raise every problem at once."""
        found: list[str] = []
        for name, kind in SECTIONS.items():
            value, preset = getattr(self, name), PRESETS.get(self.preset, {}).get(name, {})
            if preset and value == kind():  # nobody has set anything
                value = {}
            if isinstance(value, Mapping):
                value, more = build(kind, {**preset, **value}, prefix=f"{name}.")
                found += more
            elif not isinstance(value, kind):
                found.append(f"{name}: got {value!r}, expected a section of settings")
            setattr(self, name, value if isinstance(value, kind) else kind())
        if found := list(dict.fromkeys([*found, *self.problems(), *self.conflicts()])):
            raise ConfigError(found)
        super().__post_init__()

    @classmethod
    def hint(cls, key: str) -> str:
        """Return what an unknown key may have meant."""
        return super().hint({"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}.get(key, key))

    def conflicts(self) -> list[str]:
        """Return what is wrong with PEFT's settings and what does not go together, empty if all is well."""
        found, plain = list[str](), LoraConfig()
        for name, hint in {"r": Count, "lora_alpha": Positive, "lora_dropout": Share}.items():
            value, more = read(getattr(self, name), hint, name)
            found += more
            if isinstance(getattr(self, name), str) and not more:  # of YAML
                setattr(self, name, value)
        found += [
            f"{f.name}={getattr(self, f.name)!r} is not available: filter and coordinator cannot act on such a LoRA. "
            "Remove it, or call peft.get_peft_model with a peft.LoraConfig"
            for f in dataclasses.fields(LoraConfig)
            if f.init and f.name not in CARRIED and getattr(self, f.name) != getattr(plain, f.name)
        ]
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            names = value if isinstance(value, (list, set, tuple)) else [value]
            if value is not None and not all(isinstance(n, str) for n in names):
                found.append(f"{name} must be a name or a list of names, got {value!r}")
        if self.init_lora_weights not in INITIALIZATIONS and not rewrites_base(self):
            found.append(
                not_one_of("init_lora_weights", self.init_lora_weights, map(str, (*INITIALIZATIONS, *REWRITING)))
            )
        found += _together(self.coordinator, self.graph, self.filter.level)
        slices = self.fused_slices
        if slices is not None and (not slices or len(set(slices)) < len(slices) or not set(slices) <= set("qkv")):
            found.append(f"fused_slices must be a non-empty subset of ['q', 'k', 'v'], got {slices!r}")
        for pattern, rank in (self.rank_pattern or {}).items():
            if not isinstance(rank, int) or rank < 1:
                found.append(f"rank_pattern[{pattern!r}] must be >= 1, got {rank!r}")
        return found

    @property
    def taught(self) -> bool:
        """Whether noise levels are there that held-out loss can teach."""
        return self.filter.level > 0 and self.coordinator.levels != "fixed"

    @property
    def is_prompt_learning(self) -> bool:
        """What PEFT asks of every configuration first: False where it loads a plain LoRA.

        Raises:
            ConfigError: Where something is to be trained, which PEFT cannot build as this configuration says.
        """
        if self.inference_mode:
            return False
        raise ConfigError(
            [
                "PEFT alone builds no graph, filter and coordinator; use structlora_pyg.get_structlora_model(base, "
                "config), or give PEFT config.to_lora_config() for a plain LoRA"
            ]
        )

    def to_lora_config(self, **changes: Any) -> LoraConfig:
        """Return the plain `peft.LoraConfig` inside, with `changes` applied."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
        return LoraConfig(**{**values, **changes})

    def _parts(self) -> dict[str, Any]:
        """Return the settings that may name code or hold objects."""
        stages = {"filter.kind": self.filter.kind, "encoding.kind": self.encoding.kind, "stages": self.stages}
        graph = {"graph.edges": self.graph.edges, "graph.transforms": self.graph.transforms}
        coordinator = {f"coordinator.{name}": getattr(self.coordinator, name) for name in ("conv", "lift")}
        return {**stages, **graph, **coordinator, "coordinator.conv_kwargs": self.coordinator.conv_kwargs}

    def foreign_code(self) -> list[str]:
        """Return the settings that name code outside of this library and PyG, which building a model would import."""
        own = ("torch_geometric", "structlora_pyg")
        named = [(key, value) for key, part in self._parts().items() for value in _leaves(saved(part))]
        return [f"{k}={v}" for k, v in named if isinstance(v, str) and "." in v and v.split(".")[0] not in own]

    def own_fields(self) -> dict[str, Any]:
        """Return what `peft.LoraConfig` does not have, as plain values that `StructLoraConfig(**...)` takes back.

        Classes and functions are written as dotted paths; what is an object is left out, see `objects`.
        """
        own = {name: saved(vars(getattr(self, name))) for name in SECTIONS}
        others = ("preset", "stages", "fused_slices", "alarms", "seed")
        return {**own, **{name: saved(getattr(self, name)) for name in others}}

    def objects(self) -> list[str]:
        """Return the settings that are, or hold, objects, which no file can hold."""
        lost = {}
        for name, part in self._parts().items():
            kept = saved({name.rpartition(".")[2]: part})
            lost[name] = sum(leaf is None for leaf in _leaves(kept)) - sum(leaf is None for leaf in _leaves(part))
        return [name for name, count in lost.items() if count]

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]  # nothing for a hub
        """Write ``structlora_config.json`` into a folder; `StructLoraModel.save_pretrained` does it for you."""
        lora = LoraConfig().to_dict()
        changed = {k: v for k, v in self.to_lora_config().to_dict().items() if k in lora and v != lora[k]}
        changed = {k: sorted(v) if isinstance(v, set) else v for k, v in changed.items()}
        objects = self.objects()
        values = {**changed, **self.own_fields(), **({OBJECTS: objects} if objects else {})}
        replace_file(Path(save_directory) / CONFIG_FILE, json.dumps(values, indent=2, sort_keys=True, default=str))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # checkpoints to continue from are folders, on no hub
        cls, pretrained_model_name_or_path: str | Path
    ) -> StructLoraConfig:
        """Return the configuration in a folder of `save_pretrained`.

        Args:
            pretrained_model_name_or_path: The folder.

        Raises:
            FileNotFoundError: If there is none; exported adapters are plain LoRA (`peft.LoraConfig.from_pretrained`).
            ValueError: If it is damaged, or the configuration held objects.
        """
        folder = Path(pretrained_model_name_or_path)
        file = folder / CONFIG_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}; it is not a checkpoint of StructLoraModel")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            objects = values.pop(OBJECTS, [])
            if not objects:
                return cls(**values)
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); use another checkpoint") from error
        raise ValueError(
            f"{folder} was saved with objects in {', '.join(objects)}, which {CONFIG_FILE} cannot hold. Build the "
            "model with get_structlora_model(base, config), where config has those objects, and call "
            "model.load_training_state(folder)"
        )


def saved(value: Any, part: bool = True) -> Any:
    """Return a value as a file holds it: classes and functions by dotted path; None in the place of objects.

    Args:
        value: A setting, or lists and mappings of settings.
        part: Whether it names a part, which is found again by a dotted path; else it is an argument of one.
    """
    if isinstance(value, Mapping):
        names = "name" in value  # the others are its arguments
        keys = {key: part and key != "conv_kwargs" and (key == "name" or not names) for key in value}
        return {k if isinstance(k, str) else "__".join(k): saved(value[k], is_part) for k, is_part in keys.items()}
    if isinstance(value, (list, tuple)):
        return [saved(v, part) for v in value]
    if part and isinstance(value, (type, types.FunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    return value if fits_json(value) else None


def _leaves(value: Any) -> list[Any]:
    """Return the values in nested lists and mappings."""
    if isinstance(value, (Mapping, list, tuple)):
        parts = value.values() if isinstance(value, Mapping) else value
        return [leaf for part in parts for leaf in _leaves(part)]
    return [value]


SECTIONS: dict[str, Any] = {
    "graph": GraphConfig,
    "encoding": EncodingConfig,
    "filter": FilterConfig,
    "coordinator": CoordinatorConfig,
    "schedule": ScheduleConfig,
}


def _together(coordinator: CoordinatorConfig, graph: GraphConfig, noise: float) -> list[str]:
    """Return what does not go together in the settings of two stages."""
    hetero, learned = f"coordinator.hetero={coordinator.hetero}", graph.edges == "learned"
    typed = coordinator.hetero != "none"
    found = []
    if not noise and coordinator.lift == "none" and coordinator.conv not in (None, "none"):
        found.append(
            "coordinator.lift=none leaves the coordinator only noise levels, and the filter draws no noise; set "
            "filter.noise, a lift (tangent), or coordinator.conv=none"
        )
    if not noise and coordinator.levels != "graph":
        found.append(
            f"coordinator.levels={coordinator.levels} has no effect where the filter draws no noise; set filter.noise"
        )
    if coordinator.conv in (None, "none"):
        idle = {"graph.edges=learned": learned, hetero: typed}
        found += [f"{key} has no effect with coordinator.conv=none; remove it" for key, given in idle.items() if given]
    if graph.edges == "none" and typed:
        found.append(f"{hetero} needs edges between types; choose other graph.edges, or coordinator.hetero=none")
    if learned and not coordinator.messages:
        found.append("graph.edges=learned cannot be learned with coordinator.messages=false; set graph.edges=none")
    return found


def rewrites_base(config: Any) -> bool:
    """Tell whether a configuration's start changes the base weights, to which its adapter then belongs."""
    start = str(config.init_lora_weights).lower()
    return start in REWRITING or re.fullmatch(r"pissa_niter_\d+", start) is not None
