"""Strict configuration: YAML files and ``a.b=c`` overrides, merged by OmegaConf, checked by pydantic.

A YAML file may name other files in ``base:`` (paths relative to itself). They are merged in order, the file itself
on top, and the command line last; mappings merge, lists and scalars replace. Every key must exist in the schema:
a typo is an error that names the nearest key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from mhmoe_vl.errors import ConfigError, suggest


class Config(BaseModel):
    """Base of every configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(schema: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path`` with its bases, apply ``a.b=c`` overrides, and validate against ``schema``.

    Raises:
        ConfigError: missing or malformed file, unknown key, or a value that the schema refuses.
    """
    tree = _load_tree(Path(path), chain=())
    return validate_config(schema, apply_overrides(tree, overrides), where=str(path))


def validate_config(schema: type[ConfigT], tree: dict[str, Any], where: str = "config") -> ConfigT:
    """Validate a plain mapping, with every problem named by its key.

    Raises:
        ConfigError: listing all problems found.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(schema, tree, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


def dump_config(config: Config) -> str:
    """The fully resolved configuration as YAML, loadable by :func:`load_config`."""
    # Non-ASCII text is escaped: YAML would fold some of it (U+0085, U+2028) into a space when it is read back.
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``tree`` with each ``a.b=c`` applied; values are parsed as YAML."""
    merged: Any = OmegaConf.create(tree)
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override '{override}' must look like key.sub=value")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"override '{override}': {_first_line(error)}") from None
    return _plain(merged)


def _load_tree(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise ConfigError(f"{path}: 'base' files form a circle: {' -> '.join(map(str, [*chain, path.resolve()]))}")
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        near = suggest(path.name, sorted(p.name for p in path.parent.glob("*.y*ml")))
        raise ConfigError(f"{path}: no such config file{near}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_first_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: the top level must be a mapping of keys to values")
    bases = loaded.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list | ListConfig) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: 'base' must be a file name or a list of file names")
    merged: Any = OmegaConf.create({})
    for base in bases:
        merged = OmegaConf.merge(merged, _load_tree(path.parent / base, (*chain, path.resolve())))
    return _plain(OmegaConf.merge(merged, loaded))


def _plain(node: Any) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None


def _explain(schema: type[BaseModel], tree: Any, problem: Any) -> str:
    location = problem["loc"]
    name = ".".join(_keys_of(tree, problem))
    if problem["type"] == "extra_forbidden":
        known = _known_keys(schema, location[:-1])
        return f"{name}: unknown key{suggest(str(location[-1]), known)}; known keys: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{name}: is required"
    message = problem["msg"].removeprefix("Value error, ")
    if not location or isinstance(problem.get("input"), dict):
        return f"{name}: {message}" if name else message
    return f"{name}: {problem.get('input')!r}: {message}"


def _keys_of(tree: Any, problem: Any) -> list[str]:
    """The keys of the configuration on the way to a problem; pydantic puts tags and types of unions among them."""
    keys = []
    for part in problem["loc"]:
        if isinstance(tree, list) or (isinstance(tree, dict) and part in tree):
            tree = tree[part]
            keys.append(str(part))
    return [*keys, str(problem["loc"][-1])] if problem["type"] == "missing" else keys


def _known_keys(schema: Any, location: tuple[Any, ...]) -> list[str]:
    """Field names of the model that ``location`` points into (through optionals, unions, lists and mappings)."""
    models = _models_in(schema)
    for part in location:
        step: list[type[BaseModel]] = []
        for model in models:
            field = model.model_fields.get(str(part))
            if field is not None:
                step += _models_in(field.annotation)
        # The tag of a union picks one of its models; a list index or a mapping key does not change the candidates.
        tagged = [model for model in models if any(f.default == part for f in model.model_fields.values())]
        models = step or tagged or models
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
