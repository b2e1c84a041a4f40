"""One strict YAML file becomes frozen, typed settings.

Every mistake in a file is reported at once, each as ``file: key: reason``. Values are checked strictly (no string
becomes a number), so a quoted ``"0.5"`` is an error and not a surprise.
"""

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from curation.errors import ConfigError


class Settings(BaseModel):
    """Base of every settings section: frozen, strict, and refusing keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


S = TypeVar("S", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of YAML 1.2: ``1e-6`` is a number, and not text as in YAML 1.1."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def load(model: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read settings from a YAML file.

    Args:
        model: Root of the settings.
        path: The file.
        overrides: ``key.subkey=value`` changes, each value read as YAML; they win over the file.

    Raises:
        ConfigError: With every mistake at once.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from error
    try:
        tree = yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: is not valid YAML: {' '.join(str(error).split())}"]) from error
    return parse(model, *overridden(tree, str(path), overrides))


def overridden(
    tree: Any, origin: str, overrides: Sequence[str]
) -> tuple[dict[str, Any], str, dict[str, str], list[str]]:
    """Apply ``key.subkey=value`` changes to a tree of plain values.

    Returns:
        The arguments of ``parse`` behind the model: the changed tree, ``origin``, where each changed key was set, and
        changes that could not be made.

    Raises:
        ConfigError: The tree is not a mapping.
    """
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError([f"{origin}: must be a mapping of sections, got {_shown(tree)}"])
    origins: dict[str, str] = {}
    problems: list[str] = []
    for override in overrides:
        try:
            origins[_override(tree, override)] = f"--set {override}"
        except ValueError as error:
            problems.append(f"--set {override}: {error}")
    return tree, origin, origins, problems


def parse(
    model: type[S],
    tree: Mapping[str, Any],
    origin: str,
    origins: Mapping[str, str] | None = None,
    problems: Sequence[str] = (),
) -> S:
    """Check a tree of plain values.

    Args:
        model: Root of the settings.
        tree: Mappings, lists and scalars, as YAML gives them.
        origin: Name of the file, for messages.
        origins: Dotted key → where it was set, for keys that do not come from ``origin``.
        problems: Mistakes found before, reported together with these.

    Raises:
        ConfigError: With every mistake at once.
    """
    found = list(problems)
    settings: S | None = None
    try:
        # JSON mode is strict about types, but lets a list be a tuple.
        settings = model.model_validate_json(json.dumps(_with_string_keys(tree), default=str))
    except ValidationError as error:
        found += [_problem(problem, origin, origins or {}, model) for problem in error.errors()]
    except ValueError as error:
        found.append(f"{origin}: {error}")
    if settings is None or found:
        raise ConfigError(found)
    return settings


def dump(settings: Settings) -> str:
    """Return the settings as YAML, every default written out."""
    text: str = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    return text


def _override(tree: dict[str, Any], override: str) -> str:
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ValueError("must look like section.key=value")
    try:
        parsed = yaml.load(value, _Loader)  # noqa: S506
    except yaml.YAMLError:
        raise ValueError(f"value {value!r} is not valid YAML") from None
    node: Any = tree
    for index, part in enumerate(parts):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            part_key: Any = int(part)
        elif isinstance(node, dict):
            part_key = part
        else:
            raise ValueError(f"{'.'.join(parts[:index])} has no key {part}")
        if index == len(parts) - 1:
            node[part_key] = parsed
        else:
            if isinstance(node, dict) and node.get(part_key) is None:
                node[part_key] = {}
            node = node[part_key]
    return ".".join(parts)


def _with_string_keys(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(key): _with_string_keys(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_string_keys(value) for value in tree]
    return tree


_REASONS = {
    "extra_forbidden": "unknown key",
    "missing": "is required",
    "less_than_equal": "must be at most {le}, got {shown}",
    "less_than": "must be less than {lt}, got {shown}",
    "greater_than_equal": "must be at least {ge}, got {shown}",
    "greater_than": "must be more than {gt}, got {shown}",
    "literal_error": "must be {expected}, got {shown}",
    "int_type": "must be a whole number, got {shown}",
    "int_from_float": "must be a whole number, got {shown}",
    "float_type": "must be a number, got {shown}",
    "bool_type": "must be true or false, got {shown}",
    "string_type": "must be text, got {shown}",
    "tuple_type": "must be a list, got {shown}",
    "dict_type": "must be a mapping, got {shown}",
    "model_type": "must be a mapping, got {shown}",
    "model_attributes_type": "must be a mapping, got {shown}",
    "too_short": "must have at least {min_length} entries, got {actual_length}",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must match {pattern}, got {shown}",
    "value_error": "{error}",
    "finite_number": "must be a finite number, got {shown}",
}


def _problem(problem: Any, origin: str, origins: Mapping[str, str], model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    context = {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in problem.get("ctx", {}).items()
    }
    shown = _shown(problem.get("input"))
    template = _REASONS.get(problem["type"])
    reason = template.format(**context, shown=shown) if template else f"{problem['msg']}, got {shown}"
    if problem["type"] == "extra_forbidden":
        *section, name = problem["loc"]
        near = get_close_matches(str(name), _keys_of(model, section), n=1)
        reason += f"; did you mean {near[0]}?" if near else ""
    where = next((text for set_key, text in origins.items() if _is_within(key, set_key, problem["type"])), origin)
    return ": ".join(part for part in (where, key, reason) if part)


def _keys_of(model: type[BaseModel], section: Sequence[str | int]) -> list[str]:
    """Return the keys that a section has; none where what holds it is not one of ours."""
    for part in section:
        if isinstance(part, int):  # an entry of a list of sections
            continue
        field = model.model_fields.get(part)
        inner = None if field is None else _section_in(field.annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part)) is not None), None)


def _is_within(key: str, set_key: str, problem: str) -> bool:
    """Whether a mistake at ``key`` comes of what was set at ``set_key``."""
    if key == set_key or key.startswith(set_key + "."):
        return True
    return problem in ("extra_forbidden", "model_type", "model_attributes_type") and set_key.startswith(key + ".")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
