"""The configuration of a training run: defaults, presets (TOML), and single keys from the command line.

[data] and [model] also take the keyword options of the data set and the network that they name, e.g. model.depth.
"""

import dataclasses
import difflib
import json
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

from .. import data, models
from .._names import keyword_options, nearest
from . import transforms
from .choices import SAMPLERS, SUBNET_LOSSES

PRESETS = Path(__file__).parent / "presets"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = "fashion-mnist"
    root: str = ""  # folder of the images; empty: the data set's own places
    holdout: int = 0  # so many training images are evaluated in place of the test images
    fraction: float = 1.0  # train on this part of the (remaining) training images, the same part of each class
    per_class: int = 0  # train on so many images of each class; 0: on all
    part_seed: int = 0  # chooses the images of `fraction` or `per_class`; not the run's seed, so that runs share them
    workers: int = 0  # processes that read image files
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    name: str = "cifar_resnet"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class GradAugConfig:
    num_subnets: int = 3  # the one of minimum width included; 0: plain training
    sampler: str = "width"  # "width": one for all layers; "layer_width": one per class of layers; "depth": blocks
    min_width: float = 0.8  # of "width" and "layer_width"
    widths: tuple[float, ...] = ()  # of "width": drawn from these and min_width; empty: uniformly
    channels: str = "first"  # of "width" and "layer_width"; "random": others in every draw
    min_survival: float = 0.8  # of "depth": the probability that the last block is kept
    private_statistics: bool = False  # batch norm's of min_width and `widths`, updated in training
    resolutions: tuple[int, ...] = ()  # pixels; empty: the images' own size
    transforms: tuple[str, ...] = ()  # of the sub-networks' images: names in transforms.py
    distinct_transforms: bool = False  # a different one for each sub-network of a step
    subnet_loss: str = "kl"  # or "alpha_divergence", or "cross_entropy" with the targets
    temperature: float = 1.0  # of the sub-networks' loss
    subnet_weight: tuple[float, ...] = (1.0,)  # of the sub-networks' losses: one for all, or one each
    reduction: str = "sum"  # of the full network's and the sub-networks' losses: "sum" (published) or "mean"
    divisor: int = 1  # channel counts are multiples of it


@dataclasses.dataclass(frozen=True)
class RegularizeConfig:
    label_smoothing: float = 0.0  # of the full network's targets
    mixup: float = 0.0  # alpha of Mixup's Beta(alpha, alpha); 0: off
    cutmix: float = 0.0  # alpha of CutMix's; 0: off
    mix_probability: float = 1.0  # that a batch is mixed at all
    random_erasing: float = 0.0  # probability, for each image
    dropout: float = 0.0  # before the classifier
    drop_block: float = 0.0  # at the ends of the branches of the last two stages
    drop_block_size: int = 7  # pixels of the activation
    stochastic_depth: float = 0.0  # probability that the last block's branch is left out, linear over the blocks
    gradient_noise: float = 0.0  # variance at the first iteration, falling as (1 + t)^-0.55
    average_decay: float = 0.0  # of an exponential moving average of the weights, which is evaluated; 0: off


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    name: str = "cosine"  # "cosine": to 0, per iteration; "step": x gamma at each of the milestones
    warmup_epochs: float = 0.0  # linear, from 0
    milestones: tuple[int, ...] = ()  # epochs
    gamma: float = 0.1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    epochs: int = 200
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"  # "auto": CUDA where there is one
    precision: str = "fp32"  # or "bf16": autocast, weights stay fp32
    channels_last: bool = True


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    batch_size: int = 250
    widths: tuple[float, ...] = (0.8, 0.85, 0.9, 0.95, 1.0)  # calibrated and evaluated after training
    calibration_batches: int = 0  # of training images; 0: all of them


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str
    data: DataConfig
    model: ModelConfig
    gradaug: GradAugConfig
    regularize: RegularizeConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    evaluate: EvaluateConfig


SECTIONS = {
    field.name: typing.get_type_hints(Config)[field.name]
    for field in dataclasses.fields(Config)
    if field.name != "preset"
}
LARGEST = 1e18  # of the settings, whose squares float32 holds
SMALL = 32  # pixels of the images of the data sets without an option `size`
BUILDERS = {"data": data.find, "model": models.find}  # the sections that take the options of what they name


def preset_names() -> list[str]:
    """The names of the presets in this package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_config(preset: str, settings: dict[str, Any] | None = None) -> Config:
    """The resolved configuration of a preset.

    preset: a name in `preset_names()`, or the path of a TOML file (a run's own config.toml, for one).
    settings: {"section.key": value} that override it.
    Raises: ValueError for an unknown preset, section or key (naming the nearest) and for a value of the wrong type or
    outside its range; FileNotFoundError for a path that does not exist.
    """
    if preset.endswith(".toml"):
        path = Path(preset)
        if not path.is_file():
            raise FileNotFoundError(f"preset must be a name or an existing TOML file, got {preset}")
    else:
        path = PRESETS / f"{preset}.toml"
        if preset not in preset_names():
            raise ValueError(nearest("preset", preset, preset_names()))
    tables = read_toml(path)
    name = tables.pop("preset", preset)
    for section, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path} must hold keys in sections, got {section} outside of one")
    _drop_options_of_others(tables, settings or {})
    for key, value in (settings or {}).items():
        section, dot, name_in_section = key.partition(".")
        if not dot or section not in SECTIONS:
            raise ValueError(_unknown_key(key, tables))
        tables.setdefault(section, {})[name_in_section] = value
    return from_tables(name, tables)


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises: ValueError for another one."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a TOML file, got: {error}") from None


def plain_name(key: str, name: Any) -> str:
    """`name`, which becomes a folder's and stands in titles. Raises: ValueError where it could lead elsewhere."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w .,+=()-]{0,99}", name):
        raise ValueError(f"{key} must be a plain name of letters, digits and .,+=()_-, got {_toml(name)}")
    return name


def from_tables(preset: str, tables: dict[str, dict[str, Any]]) -> Config:
    """The configuration held in nested dicts, checked; what is absent keeps its default.

    preset: its name, or the path of its file, which gives the name.
    """
    if isinstance(preset, str) and preset.endswith(".toml"):
        preset = Path(preset).stem
    plain_name("preset", preset)
    sections = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            raise ValueError(nearest("section", str(section), SECTIONS))
        if not isinstance(table, dict):
            raise ValueError(f"{section} must be a section of keys, got {_toml(table)}")
        sections[section] = table
    parsed = {name: _parse(name, kind, sections.get(name, {}), tables) for name, kind in SECTIONS.items()}
    config = Config(preset=preset, **parsed)
    _check_ranges(config)
    return config


def to_tables(config: Config) -> dict[str, dict[str, Any]]:
    """The inverse of `from_tables`: nested dicts of plain values."""
    tables = {}
    for name in SECTIONS:
        table = dataclasses.asdict(getattr(config, name))
        table |= table.pop("options", {})
        tables[name] = {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}
    return tables


def to_toml(config: Config) -> str:
    """The configuration as a TOML file that `load_config` reads."""
    lines = [f"preset = {_toml(config.preset)}"]
    for section, table in to_tables(config).items():
        lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def parse_setting(text: str) -> tuple[str, Any]:
    """`section.key=value` as (key, value). The value is read as TOML; what is not TOML is a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set must be given section.key=value, got {text}")
    try:
        tables = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        tables = {}
    return key.strip(), tables["value"] if tables.keys() == {"value"} else value.strip()


def difference(config: Config, other: Config, free: tuple[str, ...] = ()) -> str | None:
    """The first "section.key", of those not in `free`, in which two configurations differ; None if they do not."""
    ours, theirs = to_tables(config), to_tables(other)
    for section, table in ours.items():
        for key in {**table, **theirs[section]}:
            if f"{section}.{key}" not in free and table.get(key) != theirs[section].get(key):
                return f"{section}.{key}"
    return None


def _drop_options_of_others(tables, settings):
    """Remove the preset's options of the data set and of the model in whose place `settings` name another one.

    The sub-networks' resolutions keep their ratio to the images' size.
    """
    for section, find in BUILDERS.items():
        table = tables.get(section, {})
        before = table.get("name", SECTIONS[section].name)
        after = settings.get(f"{section}.name", before)
        if after == before or not all(isinstance(name, str) for name in (before, after)):
            continue
        sizes = [keyword_options(find(name)).get("size", SMALL) for name in (before, after)]
        sizes = table.get("size", sizes[0]), settings.get(f"{section}.size", sizes[1])
        for key in keyword_options(find(before)):
            table.pop(key, None)
        resolutions = tables.get("gradaug", {}).get("resolutions")
        if section == "data" and sizes[0] != sizes[1] and resolutions and all(type(n) is int for n in sizes):
            tables["gradaug"]["resolutions"] = [max(1, round(size * sizes[1] / sizes[0])) for size in resolutions]


def _parse(section, kind, table, tables):
    """One section's dataclass from its table."""
    hints = typing.get_type_hints(kind)
    options = {}
    if section in BUILDERS:
        hints.pop("options")
        name = _typed(f"{section}.name", table.get("name", kind.name), str)
        options = keyword_options(BUILDERS[section](name))
    values = {}
    for key, value in table.items():
        if key not in hints and key not in options:
            raise ValueError(_unknown_key(f"{section}.{key}", tables))
        values[key] = _typed(f"{section}.{key}", value, hints.get(key) or type(options[key]))
    if section not in BUILDERS:
        return kind(**values)
    fields = {key: value for key, value in values.items() if key in hints}
    return kind(**fields, options={key: values.get(key, default) for key, default in options.items()})


def _unknown_key(key, tables):
    known = []
    for section, kind in SECTIONS.items():
        names = [field.name for field in dataclasses.fields(kind) if field.name != "options"]
        if section in BUILDERS:
            names += keyword_options(BUILDERS[section](tables.get(section, {}).get("name", kind.name)))
        known += [f"{section}.{name}" for name in names]
    # A mistyped or forgotten section should not hide a key whose own name is right.
    ends = [name for name in known if name.split(".")[1] == key.split(".")[-1]]
    return nearest("key", key, difflib.get_close_matches(key, ends, n=1, cutoff=0.0) or known)


def _typed(key, value, kind):
    """`value` as `kind`; an integer may stand for a float, a list for a tuple."""
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key} must be a list, got {_toml(value)}")
        return tuple(_typed(f"each entry of {key}", entry, typing.get_args(kind)[0]) for entry in value)
    bits = 63 if key.endswith("seed") else 31
    if type(value) is int and abs(value) >= 2**bits:
        raise ValueError(f"{key} must be a number below 2^{bits}, got one of {len(str(abs(value)))} digits")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        raise ValueError(f"{key} must be {names[kind]}, got {_toml(value)}")
    if kind is float and not abs(value) <= LARGEST:
        raise ValueError(f"{key} must be a finite number of at most {LARGEST:g}, got {value}")
    if kind is str and not value.isascii() and value.encode("utf-8", "replace").decode("utf-8") != value:
        raise ValueError(f"{key} must be text that UTF-8 can hold, got {_toml(value)}")
    return value


def _toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's but for DEL
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value)


def _check_ranges(config):
    def require(condition, key, expected):
        if not condition:
            section, name = key.split(".")
            raise ValueError(f"{key} must be {expected}, got {_toml(getattr(getattr(config, section), name))}")

    _check_train(config.train, require)
    _check_data(config.data, require)
    _check_gradaug(config.gradaug, require)
    _check_subnet_loss(config.gradaug, require)
    _check_regularize(config.regularize, require)
    _check_optimizer(config.optimizer, require)
    _check_schedule(config.schedule, config.train.epochs, require)
    _check_evaluate(config.evaluate, require)


def _check_train(run, require):
    require(run.epochs >= 1, "train.epochs", "at least 1")
    require(run.batch_size >= 1, "train.batch_size", "at least 1")
    require(run.seed >= 0, "train.seed", "at least 0")
    require(run.precision in ("fp32", "bf16"), "train.precision", '"fp32" or "bf16"')


def _check_data(data, require):
    require(data.holdout >= 0, "data.holdout", "at least 0")
    require(0 < data.fraction <= 1, "data.fraction", "in (0, 1]")
    require(data.per_class >= 0, "data.per_class", "at least 0")
    require(data.fraction == 1 or data.per_class == 0, "data.per_class", "0 with a fraction")
    require(data.part_seed >= 0, "data.part_seed", "at least 0")
    require(0 <= data.workers <= 512, "data.workers", "from 0 to 512")


def _check_gradaug(gradaug, require):
    require(0 <= gradaug.num_subnets <= 1000, "gradaug.num_subnets", "from 0 to 1000")
    require(gradaug.sampler in SAMPLERS, "gradaug.sampler", _one_of(SAMPLERS))
    require(0 < gradaug.min_width <= 1, "gradaug.min_width", "in (0, 1]")
    above_min = all(gradaug.min_width <= width <= 1 for width in gradaug.widths)
    require(above_min, "gradaug.widths", f"widths in [{gradaug.min_width}, 1]")
    require(not gradaug.widths or gradaug.sampler == "width", "gradaug.widths", 'empty but for the sampler "width"')
    require(gradaug.channels in ("first", "random"), "gradaug.channels", '"first" or "random"')
    random_channels = gradaug.channels == "random"
    require(not random_channels or gradaug.sampler != "depth", "gradaug.channels", '"first" for the sampler "depth"')
    private = gradaug.private_statistics
    require(not random_channels or not private, "gradaug.private_statistics", "false for random channels")
    require(0 < gradaug.min_survival <= 1, "gradaug.min_survival", "in (0, 1]")
    known = all(name in transforms.NAMES for name in gradaug.transforms)
    require(known, "gradaug.transforms", f"of {', '.join(transforms.NAMES)}")
    enough = not gradaug.distinct_transforms or len(gradaug.transforms) >= gradaug.num_subnets
    require(enough, "gradaug.transforms", f"at least {gradaug.num_subnets} to be distinct")
    require(all(size >= 1 for size in gradaug.resolutions), "gradaug.resolutions", "sizes of at least 1 pixel")
    require(gradaug.divisor >= 1, "gradaug.divisor", "at least 1")


def _check_subnet_loss(gradaug, require):
    require(gradaug.subnet_loss in SUBNET_LOSSES, "gradaug.subnet_loss", f"one of {', '.join(SUBNET_LOSSES)}")
    softened = gradaug.temperature != 1
    require(gradaug.temperature > 0, "gradaug.temperature", "positive")
    require(not softened or gradaug.subnet_loss != "cross_entropy", "gradaug.temperature", "1 for cross_entropy")
    weights = gradaug.subnet_weight
    require(len(weights) in (1, gradaug.num_subnets), "gradaug.subnet_weight", f"one or {gradaug.num_subnets} numbers")
    require(all(weight >= 0 for weight in weights), "gradaug.subnet_weight", "numbers of at least 0")
    require(gradaug.reduction in ("sum", "mean"), "gradaug.reduction", '"sum" or "mean"')


def _check_regularize(regularize, require):
    for name in ("mixup", "cutmix", "gradient_noise"):
        require(getattr(regularize, name) >= 0, f"regularize.{name}", "at least 0")
    for name in ("mix_probability", "random_erasing"):
        require(0 <= getattr(regularize, name) <= 1, f"regularize.{name}", "in [0, 1]")
    for name in ("label_smoothing", "dropout", "drop_block", "stochastic_depth", "average_decay"):
        require(0 <= getattr(regularize, name) < 1, f"regularize.{name}", "in [0, 1)")
    require(regularize.drop_block_size >= 1, "regularize.drop_block_size", "at least 1")


def _check_optimizer(optimizer, require):
    require(optimizer.lr >= 0, "optimizer.lr", "at least 0")
    require(0 <= optimizer.momentum < 1, "optimizer.momentum", "in [0, 1)")
    require(optimizer.weight_decay >= 0, "optimizer.weight_decay", "at least 0")
    require(optimizer.momentum > 0 or not optimizer.nesterov, "optimizer.nesterov", "false without momentum")


def _check_schedule(schedule, epochs, require):
    require(schedule.name in ("cosine", "step"), "schedule.name", '"cosine" or "step"')
    require(0 <= schedule.warmup_epochs <= epochs, "schedule.warmup_epochs", f"in [0, {epochs}]")
    steps = schedule.name == "step"
    require(bool(schedule.milestones) == steps, "schedule.milestones", 'set for "step", and only for it')
    require(all(epoch >= 0 for epoch in schedule.milestones), "schedule.milestones", "epochs of at least 0")
    require(schedule.gamma >= 0, "schedule.gamma", "at least 0")


def _check_evaluate(evaluate, require):
    require(evaluate.batch_size >= 1, "evaluate.batch_size", "at least 1")
    usable = evaluate.widths and all(0 < width <= 1 for width in evaluate.widths)
    require(usable, "evaluate.widths", "widths in (0, 1]")
    require(evaluate.calibration_batches >= 0, "evaluate.calibration_batches", "at least 0")


def _one_of(names):
    *others, last = (f'"{name}"' for name in names)
    return f"{', '.join(others)} or {last}"
