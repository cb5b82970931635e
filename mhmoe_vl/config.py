"""Strict configuration: YAML files and ``a.b=c`` overrides, merged by OmegaConf, checked by pydantic.

A YAML file may name other files in ``base:`` (paths relative to itself). They are merged in order, the file itself
on top, and the command line last; mappings merge, lists and scalars replace. An entry of a mapping by name, such as
``data.train.text``, is taken away with ``null``. Every key must exist in the schema: a typo is an error that names the
nearest key.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from mhmoe_vl.errors import ConfigError, suggest


class Config(BaseModel):
    """Base of every configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


ConfigT = TypeVar("ConfigT", bound=Config)

_Keys: TypeAlias = tuple[str, ...]


def load_config(schema: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path`` with its bases, apply ``a.b=c`` overrides, and validate against ``schema``.

    Raises:
        ConfigError: missing or malformed file, unknown key, or a value that the schema refuses.
    """
    return ConfigFile(schema, path).load(overrides)


class ConfigFile(Generic[ConfigT]):
    """A configuration file with its bases, read once for any number of overrides.

    Raises:
        ConfigError: missing or malformed file.
    """

    def __init__(self, schema: type[ConfigT], path: str | Path) -> None:
        self._schema, self._path = schema, path
        self._removable = list(_named_mappings(schema))
        self._tree = _load_tree(Path(path), self._removable, chain=())

    def load(self, overrides: Sequence[str] = ()) -> ConfigT:
        """Raises:
        ConfigError: unknown key, or a value that the schema refuses.
        """
        tree = _apply_overrides(copy.deepcopy(self._tree), overrides, self._removable)
        where = str(self._path)
        return validate_config(self._schema, _without_removed(tree, self._removable, where=where), where=where)


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


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str], removable: Sequence[_Keys]) -> dict[str, Any]:
    """``tree`` with each ``a.b=c`` applied; values are parsed as YAML."""
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override '{override}' must look like key.sub=value")
        try:
            tree = _merge(tree, OmegaConf.from_dotlist([override]), removable, where=f"override '{override}'")
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"override '{override}': {_first_line(error)}") from None
    return tree


def _load_tree(path: Path, removable: Sequence[_Keys], chain: tuple[Path, ...]) -> dict[str, Any]:
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
    merged: dict[str, Any] = {}
    for base in bases:
        tree = _load_tree(path.parent / base, removable, (*chain, path.resolve()))
        merged = _merge(merged, OmegaConf.create(tree), removable, where=str(path.parent / base))
    return _merge(merged, loaded, removable, where=str(path))


def _merge(lower: dict[str, Any], upper: DictConfig, removable: Sequence[_Keys], where: str) -> dict[str, Any]:
    """``upper`` on top of ``lower``.

    Raises:
        ConfigError: an empty mapping where ``lower`` has entries: merging it would change nothing, without a word.
    """
    entries: Any = OmegaConf.to_container(upper, resolve=False)
    _refuse_empty(lower, entries, removable, where)
    for keys in removable:
        below, above = _at(lower, keys), _at(entries, keys)
        for name in [name for name, value in above.items() if value is None and below.get(name) is not None]:
            # Both go, so that a later file may name the entry anew. Where there is nothing to take away, null stays:
            # the file may be merged onto another that has the entry.
            del below[name], above[name]
    return _plain(OmegaConf.merge(OmegaConf.create(lower), OmegaConf.create(entries)))


def _refuse_empty(
    lower: dict[str, Any], upper: dict[str, Any], removable: Sequence[_Keys], where: str, parents: _Keys = ()
) -> None:
    for key, value in upper.items():
        below, keys = lower.get(key), (*parents, str(key))
        if not isinstance(value, dict) or not isinstance(below, dict):
            continue
        if below and not value:
            name = ".".join(keys)
            remedy = "set its keys one by one"
            if parents in removable or keys in removable:
                remedy = f"take an entry away with {name if parents in removable else name + '.NAME'}=null"
            raise ConfigError(
                f"{where}: {name}: an empty mapping changes nothing of what it is merged onto "
                f"({', '.join(map(str, below))}); {remedy}"
            )
        _refuse_empty(below, value, removable, where, keys)


def _without_removed(tree: dict[str, Any], removable: Sequence[_Keys], where: str) -> dict[str, Any]:
    """The merged ``tree``, in which a ``null`` that is left has taken nothing away.

    Raises:
        ConfigError: there is one.
    """
    for keys in removable:
        entries = _at(tree, keys)
        for name in [name for name, value in entries.items() if value is None]:
            known = [other for other, value in entries.items() if value is not None]
            raise ConfigError(
                f"{where}: {'.'.join((*keys, name))}: null takes an entry away, and there is none of this name"
                f"{suggest(name, known)}; entries: {', '.join(known) or 'none'}"
            )
    return tree


def _at(tree: dict[str, Any], keys: _Keys) -> dict[str, Any]:
    """The mapping that ``keys`` lead to; an empty one if there is none."""
    node: Any = tree
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _named_mappings(schema: type[BaseModel], keys: _Keys = ()) -> Iterator[_Keys]:
    """Where the schema has mappings of configurations by name, whose entries a file may add and take away."""
    for name, field in schema.model_fields.items():
        if get_origin(field.annotation) is dict:
            yield (*keys, name)
            continue
        for model in _models_in(field.annotation):
            yield from _named_mappings(model, (*keys, name))


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
