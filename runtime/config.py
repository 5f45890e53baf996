"""One run's configuration: a frozen dataclass filled from a YAML preset and `key=value` overrides.

Schemas live in the rooms that read them. Pydantic checks types and choices; the key walk below exists because an
unknown key must name its nearest valid neighbour.
"""

import dataclasses
import difflib
import hashlib
import json
import shutil
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import UserError

Config = TypeVar("Config")


def preset_names() -> list[str]:
    """Names of the presets shipped in `configs/`."""
    folder = resources.files("configs")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_yaml(source: str) -> dict[str, Any]:
    """The mapping in a YAML file; `source` is a path or the name of a preset. Raises UserError."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"config: no file {source}\n  presets: {', '.join(preset_names())}")
        text = path.read_text()
    elif source in preset_names():
        text = resources.files("configs").joinpath(f"{source}.yaml").read_text()
    else:
        raise UserError(
            f"config: {source!r} is neither a YAML file nor a preset{_nearest(source, preset_names())}\n"
            f"  presets: {', '.join(preset_names())}"
        )
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        raise UserError(f"config {source}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config {source}: expected a mapping of keys, found {type(content).__name__}")
    return content


def load(schema: type[Config], source: str | None, overrides: Sequence[str] = ()) -> Config:
    """A `schema` filled from a preset or file (None: defaults only) and `a.b=value` overrides. Raises UserError."""
    values = read_yaml(source) if source else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or key.startswith("-"):
            raise UserError(f"{override!r}: expected key=value, for example train.steps=100 (no dashes)")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{key}: {text!r} is not valid YAML; quote it: {key}='\"...\"'") from error
        _set(values, key.split("."), value, schema)
    return build(schema, values)


def build(schema: type[Config], values: Mapping[str, Any]) -> Config:
    """A `schema` from nested mappings. Raises UserError on an unknown key, a wrong type or a wrong choice."""
    import pydantic

    _check_keys(schema, values, prefix="")
    try:
        return pydantic.TypeAdapter(schema).validate_python(dict(values))
    except pydantic.ValidationError as error:
        lines = [_explain(entry) for entry in error.errors()[:3]]
        raise UserError("\n".join(lines)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested values, as YAML and JSON write them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, in the schema's order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: Any, *, ignore: Sequence[str] = ("out", "workers", "device")) -> str:
    """First 16 hex digits of the SHA-256 of a config, without the keys that do not change its result."""
    values = {key: value for key, value in to_dict(config).items() if key not in ignore}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def claim_output(out: Path, config: Any, *, ignore: Sequence[str] = ("out", "workers", "device")) -> None:
    """Make `out` the folder of this config: write `config.yaml`, or check that the one there says the same.

    Raises UserError when the folder belongs to another config (naming the differences) or holds foreign files.
    """
    from .files import write_text

    stored = out / "config.yaml"
    if stored.is_file():
        old = yaml.safe_load(stored.read_text()) or {}
        changed = [line for line in differences(old, to_dict(config)) if line.split(":")[0].split(".")[0] not in ignore]
        if changed:
            shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
            raise UserError(
                f"out: {out} belongs to another config\n  differs in {shown}\n"
                f"  give another out=..., or remove that folder to start afresh"
            )
        return
    if out.is_file():
        raise UserError(f"out: {out} is a file; expected a folder or a free name")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"out: {out} is not empty and holds no config.yaml of ours; give another out=...")
    write_text(stored, to_yaml(config))


@contextmanager
def claiming(out: Path, config: Any) -> Iterator[None]:
    """`claim_output` for a block of work; when the user's input stops it before anything was made, no folder stays."""
    existed = out.exists()
    claim_output(out, config)
    try:
        yield
    except UserError:
        made = {path.relative_to(out).parts[0] for path in out.rglob("*") if path.is_file()}
        if not existed and made <= {"config.yaml", "times.json", "index"}:
            shutil.rmtree(out)
        raise


def _set(values: dict[str, Any], keys: list[str], value: Any, schema: type) -> None:
    """Put `value` at a dotted key; the key itself is checked later, against the schema."""
    for depth, key in enumerate(keys[:-1]):
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"{'.'.join(keys)}: {'.'.join(keys[: depth + 1])} holds a value, not a group of keys")
        values = inner
    values[keys[-1]] = value


def _check_keys(schema: Any, values: Any, prefix: str) -> None:
    if typing.get_origin(schema) is tuple:
        element = typing.get_args(schema)[0]
        if dataclasses.is_dataclass(element) and isinstance(values, (list, tuple)):
            for i, value in enumerate(values):
                _check_keys(element, value, f"{prefix.rstrip('.')}[{i}].")
        return
    if not dataclasses.is_dataclass(schema) or not isinstance(values, Mapping):
        return
    types = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in types:
            hint = _elsewhere(str(key), types, prefix) or _nearest(str(key), list(types), prefix)
            raise UserError(f"unknown key {prefix}{key}{hint}\n  valid here: {', '.join(types)}")
        _check_keys(types[key], value, f"{prefix}{key}.")


def _nearest(name: str, valid: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _elsewhere(name: str, types: Mapping[str, Any], prefix: str) -> str:
    for group, inner in types.items():
        if dataclasses.is_dataclass(inner) and name in {field.name for field in dataclasses.fields(inner)}:
            return f"; did you mean {prefix}{group}.{name}?"
    return ""


def _explain(entry: Any) -> str:
    """One line for one pydantic error: key, found, expected."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in entry["loc"]).lstrip(".")
    if entry["type"] == "missing":
        return f"{key}: missing; give it in the config or as {key}=..."
    if entry["type"] == "tuple_type":
        return f"{key}: found {entry['input']!r}; expected a list: {key}=[{entry['input']}]"
    choices = entry.get("ctx", {}).get("expected")
    if choices and entry["type"] == "literal_error":
        valid = [choice.strip("'") for choice in choices.replace(" or ", ", ").split(", ")]
        return f"{key}: found {entry['input']!r}{_nearest(str(entry['input']), valid)} (expected {', '.join(valid)})"
    return f"{key}: found {entry['input']!r}; {entry['msg'].lower()}"
