"""A run's configuration: the rooms' sections composed, read from YAML, overridden from the command line.

A file may name a `base:` (a path relative to itself, or a packaged configuration) and change a few keys of
it; mappings merge key by key, lists and scalars replace. `section.key=value` overrides come on top.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from triptych.data_pipeline.kinds import AnyDataConfig
from triptych.models.families import AnyModelConfig
from triptych.parallel.config import ParallelConfig
from triptych.training.config import CheckpointConfig, LogConfig, TrainConfig

PACKAGED = Path(__file__).resolve().parent.parent / "configs"
"""The configurations that ship with triptych (lm/demo.yaml and so on), beside this room in every install."""


class ConfigError(ValueError):
    """One or more keys of a configuration are wrong; the message has one line for each."""


class ClusterConfig(BaseModel):
    """`cluster:`, where the workers come from and what each of them gets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = None
    """Address of a running Ray cluster, such as "auto" or "10.0.0.1:6379"; null starts a Ray on this machine
    and stops it at the end (or takes RAY_ADDRESS where that is set, as within a Ray job)."""
    max_failures: int = Field(default=3, ge=-1)
    """Restarts of the workers, from the newest checkpoint, after one of them died; -1 without limit."""
    use_gpu: bool | None = None
    """One GPU for each worker; null: yes if the cluster has any GPU."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """Logical CPUs that each worker reserves; a Ray of our own has enough of them, whatever the cores."""
    resources_per_worker: dict[str, float] = {}
    """Further Ray resources that each worker reserves, by name."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """Threads of each worker's matrix products; null: cores of the node / workers on it, at least 1."""
    env_vars: dict[str, str] = {}
    """Environment variables of the workers, such as NCCL_IB_HCA; the driver's own are not forwarded."""
    collective_timeout: float = Field(default=1800.0, gt=0)
    """Seconds after which a collective operation that does not return counts as a failure."""

    @field_validator("env_vars", mode="before")
    @classmethod
    def _as_strings(cls, values: Any) -> Any:
        # YAML reads NCCL_DEBUG_LEVEL: 1 as a number; the environment has only strings.
        if isinstance(values, dict):
            return {
                key: str(value) if isinstance(value, int | float) else value for key, value in values.items()
            }
        return values


class RunConfig(BaseModel):
    """Everything that decides what a run computes, and where it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """First part of the run directory's name; letters, digits, dots, dashes and underscores."""
    model: AnyModelConfig
    """What is built."""
    data: AnyDataConfig
    """What it is trained on."""
    parallel: ParallelConfig = ParallelConfig()
    """How it is cut over the workers."""
    train: TrainConfig
    """How it is optimised, and for how long."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When its state is written."""
    log: LogConfig = LogConfig()
    """What it reports."""
    cluster: ClusterConfig = ClusterConfig()
    """Where it runs."""

    def to_dict(self) -> dict[str, Any]:
        """Every key, defaults included, as plain YAML values."""
        return _plain(self.model_dump())

    def to_yaml(self) -> str:
        """The text of a configuration file that loads to an equal RunConfig."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, width=110)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in the file `path`, with `section.key=value` overrides on top.

    path: a YAML file, a run directory (its config.yaml), or a packaged configuration such as
        "configs/lm/demo.yaml".
    Raises ConfigError naming each wrong key, its value and the nearest known key; ValueError for a file that
    is missing or is not YAML, for a cycle of bases and for an override that does not parse.
    """
    file = find(path)
    values = _read_with_bases(file)
    overridden = [_apply(values, *parse_override(text)) for text in overrides]
    return validate(values, source=str(path), overridden=overridden)


def validate(values: Mapping[str, Any], *, source: str, overridden: Sequence[str] = ()) -> RunConfig:
    """A RunConfig from plain values. Raises ConfigError, its lines headed by `source` unless `overridden`."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        # A list that lost its only item to an error is reported as empty, too; the item's error says more.
        deepest = [p for p in problems if not any(_is_above(p["loc"], other["loc"]) for other in problems)]
        lines: dict[str, str] = {}
        for problem in deepest:  # each branch of a union complains; one line per key holds them all
            head, message = _explain(problem, source, overridden)
            if not head:
                head, message = message, ""  # says all by itself, and has nothing to do with the others
            lines[head] = f"{lines[head]}, or {message}" if lines.get(head) else message
        raise ConfigError("\n".join(head + message for head, message in lines.items())) from error


def find(path: str | Path, relative_to: Path | None = None) -> Path:
    """The file that `path` means. Raises ValueError, with near names, when there is none."""
    path = Path(path).expanduser()
    folder = relative_to or Path()
    packaged = PACKAGED.joinpath(*path.parts[1:]) if path.parts[:1] == ("configs",) else PACKAGED / path
    candidates = [folder / path] if path.is_absolute() else [folder / path, packaged]
    for candidate in candidates:
        if candidate.is_dir() and (candidate / "config.yaml").is_file():
            return candidate / "config.yaml"
        for file in (candidate, candidate.with_name(candidate.name + ".yaml")):
            if file.is_file():
                return file
    known = [f"configs/{file.relative_to(PACKAGED)}" for file in sorted(PACKAGED.rglob("*.yaml"))]
    near = difflib.get_close_matches(str(path), known, n=3, cutoff=0.5) or known
    raise ValueError(f"no configuration at {path}; packaged ones are {', '.join(near)}")


def parse_override(text: str) -> tuple[str, Any]:
    """("train.steps", 200) from "train.steps=200"; the value is YAML. Raises ValueError if it is not."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ValueError(f"override {text!r} is not section.key=value; write for example train.steps=200")
    try:
        return key, yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(
            f"override {text!r}: the value is not YAML ({_yaml_problem(error)}); quote it"
        ) from error


def _read_with_bases(file: Path) -> dict[str, Any]:
    """The file's values merged over those of its bases, outermost base first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    current: Path | None = file.resolve()
    while current is not None:
        if current in [seen for seen, _ in chain]:
            names = " -> ".join(str(seen) for seen, _ in chain)
            raise ValueError(f"base: {names} -> {current} is a cycle; remove one of these lines")
        values = _read(current)
        chain.append((current, values))
        base = values.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise ValueError(f"{current}: base={base!r} must be the path of one configuration file")
        current = find(base, relative_to=current.parent).resolve() if base is not None else None
    merged: dict[str, Any] = {}
    for _, values in reversed(chain):
        merged = _merge(merged, values)
    return merged


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {_yaml_problem(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text; is it a configuration?") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{file} holds {type(values).__name__}, not a mapping of sections (model:, data:, train:, ...)"
        )
    return values


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + str(getattr(error, "problem", None) or error)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply(values: dict[str, Any], key: str, value: Any) -> str:
    """Set the dotted `key` in place (an integer part indexes a list); returns the key as errors name it."""
    *parents, last = key.split(".")
    node: Any = values
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            above = ".".join(parents[: depth + 1])
            raise ValueError(f"override {key}: {above}={node!r} is a value, it has no keys of its own")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value
    return _join(int(part) if part.isdigit() else part for part in (*parents, last))


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(f"override {key}: {part!r} must be the index of one of {len(node)} items, from 0")
    return int(part)


def _is_above(location: Sequence[str | int], other: Sequence[str | int]) -> bool:
    return len(location) < len(other) and tuple(other[: len(location)]) == tuple(location)


def _explain(problem: Any, source: str, overridden: Sequence[str]) -> tuple[str, str]:
    """One of pydantic's errors as (where from, key and value; what was expected or the mend)."""
    location = [part for part in problem["loc"] if isinstance(part, int) or re.fullmatch(r"\w+", part)]
    known = dict(_known_keys(RunConfig))
    # pydantic appends the branch of a union ("str", "list[str]") to the location; the key ends before it.
    while (
        location
        and problem["type"] not in ("extra_forbidden", "missing")
        and _schema_key(location) not in known
    ):
        location.pop()
    key = _join(location)
    own = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else ""
    if f"{key}." in own or f"{key}=" in own:
        return "", own  # a room's own check names key, value and mend already
    given = any(
        name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in overridden
    )
    where = "" if given else f"{source}: "
    if problem["type"] == "extra_forbidden":
        return f"{where}{key} is not a known key; ", _suggest(location, known)
    if problem["type"] == "union_tag_invalid":  # of a family or kind; the tags are in parentheses
        told = problem["ctx"]
        name = told["discriminator"].strip("_()")
        return f"{where}{key}.{name}={told['tag'].strip('()')!r}: ", (
            f"use one of {re.sub('[()]', '', told['expected_tags'])}"
        )
    if problem["type"] == "missing":
        return f"{where}{key} is missing; ", known.get(_schema_key(location), "add it")
    if own and isinstance(problem["input"], dict):
        return f"{where}{key}: ", own  # of keys within the section, which the message names
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{where}{key}={problem['input']!r}: ", message[0].lower() + message[1:]


def _suggest(location: Sequence[str | int], known: Mapping[str, str]) -> str:
    """The nearest known key: a sibling that looks alike, the name in another section, or all siblings."""
    *parents, name = location
    prefix = _schema_key(parents)
    if _schema_key(location) in known:
        return f"it belongs to another family or kind of {_join(parents)}; remove it"
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == prefix]
    near = difflib.get_close_matches(str(name), siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {_join([*parents, near[0]])}?"
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    near = elsewhere or difflib.get_close_matches(_schema_key(location), known, n=1, cutoff=0.75)
    if near:
        return f"did you mean {near[0]}?"
    return f"known here are {', '.join(siblings)}"


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, type) of every field, through nested sections and lists of them."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        yield prefix + name, f"expected {_type_name(annotation)}"
        for nested in _sections_in(annotation):
            yield from _known_keys(nested, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)


def _type_name(annotation: Any) -> str:
    plain = isinstance(annotation, type) and not typing.get_args(annotation)
    if plain and issubclass(annotation, BaseModel):
        required = [name for name, field in annotation.model_fields.items() if field.is_required()]
        return f"a section with {', '.join(required) or 'any of its keys'}"
    return (
        annotation.__name__ if plain else str(annotation).replace("typing.", "").replace("NoneType", "null")
    )


def _schema_key(location: Sequence[str | int]) -> str:
    return ".".join(part for part in location if isinstance(part, str))


def _join(parts: typing.Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _plain(value: Any) -> Any:
    """Tuples as lists and paths as strings, so that YAML needs no tags."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class _Dumper(yaml.SafeDumper):
    """Writes lists of scalars on one line."""


def _represent_list(dumper: _Dumper, values: list[Any]) -> yaml.Node:
    flat = not any(isinstance(value, dict | list) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flat)


_Dumper.add_representer(list, _represent_list)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number (YAML 1.1 asks for a dot) and refuses a key written twice."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key.value!r} is written twice in one mapping", key.start_mark
            )
        seen.add(key.value)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True)
        for key, value in node.value
    }


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)|[-+]\.(?:inf|Inf|INF))$"
    ),
    list("-+0123456789."),
)
