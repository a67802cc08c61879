"""From YAML text and `key=value` overrides to typed dataclasses, with errors a reader can act on.

Knows nothing of fastomni's own settings: it works on any tree of dataclasses. YAML is read as plain
data only: tags, anchors and aliases are refused while the text is still being parsed, so that a
file can neither run code nor grow in memory, and a file over 64 KiB is refused unread, because the
YAML parser needs about a second for that much and a configuration so long is a mistake.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from fastomni.config_help import all_keys, type_name

MAX_BYTES = 64 * 1024
COMMAND_LINE = "command line"

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
    """A setting that cannot be used: says where it stands, what it is, why not and what to do.

    Args:
        problem: what is wrong and what to do, one sentence.
        key: dotted key the problem belongs to; empty for a problem of the whole file.
        value: what `key` was set to; left out of the message when not given.
        source: the file, or "command line".
    """

    _NOTHING: Any = object()

    def __init__(
        self, problem: str, key: str = "", value: Any = _NOTHING, source: str = ""
    ) -> None:
        self.problem, self.key, self.value, self.source = problem, key, value, source
        setting = f"{key}: " if key else ""
        if key and value is not ConfigError._NOTHING:
            setting = f"{key}={show(value)} "
        super().__init__(f"{source}: " * bool(source) + setting + problem)

    def below(self, parent: str) -> ConfigError:
        """The same error, seen from the section `parent` that holds its key."""
        key = f"{parent}.{self.key}" if self.key else parent
        return ConfigError(self.problem, key, self.value, self.source)

    def found_in(self, source: str) -> ConfigError:
        """The same error with the name of the file, or of the command line, in front."""
        return ConfigError(self.problem, self.key, self.value, source)


def check(condition: bool, key: str, value: Any, problem: str) -> None:
    """Raises ConfigError(problem) about `key` unless `condition` holds; for `__post_init__`."""
    if not condition:
        raise ConfigError(problem, key, value)


def check_text(key: str, value: str) -> None:
    """A text with something in it."""
    check(bool(value.strip()), key, value, "is empty; give it a text or leave the key out")
    check("\0" not in value, key, value, "holds a NUL character; remove it")


def check_at_least(minimum: int, key: str, value: int | float | None) -> None:
    """A number of at least `minimum`, or None where the setting may be left open."""
    check(value is None or value >= minimum, key, value, f"is too small; use {minimum} or more")


def check_positive(key: str, value: int | float | None) -> None:
    """A number greater than 0, or None where the setting may be left open."""
    check(value is None or value > 0, key, value, "must be greater than 0")


def check_names(key: str, names: list[str]) -> None:
    """One name or more, each once."""
    check(bool(names), key, names, "is empty; name at least one")
    for index, name in enumerate(names):
        check_text(f"{key}[{index}]", name)
        check(names.index(name) == index, key, names, f"names {name} twice; keep one")


def nearest(name: str, valid: list[str]) -> str | None:
    """The entry of `valid` most like `name`, or None where none is near."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return near[0] if near else None


def show(value: Any) -> str:
    """A value as YAML writes it, cut to 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        text = f"[{', '.join(show(part) for part in value[:60])}]"
    elif isinstance(value, str):
        text = value if value.isidentifier() else repr(value)
    else:
        try:
            text = str(value)
        except ValueError:  # Python refuses to print an int of more than 4,300 digits
            text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= 60 else text[:57] + "..."


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader less tags, anchors and aliases, and with duplicate keys refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:  # an alias carries its anchor's name
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases (&name, *name) are not read here; "
                "write the value out where it is used",
                problem_mark=event.start_mark,
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"the tag {show(event.tag)} is not read here; write plain values only",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a plain name", problem_mark=key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {show(key_node.value)} is given twice; keep one",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, source: str, key: str = "") -> Any:
    """Plain data from YAML text.

    Args:
        text: YAML, at most 64 KiB.
        source: the file, or "command line", for the error message.
        key: dotted key whose value the text is; empty for a whole file.

    Raises:
        ConfigError: where the text is no YAML, or asks for more than plain data.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        problem = f"is larger than {MAX_BYTES // 1024} KiB, which no configuration needs"
        raise ConfigError(problem, key, source=source)
    try:
        return yaml.load(text, Loader=_PlainLoader)  # a SafeLoader
    except RecursionError:
        raise ConfigError("is nested too deeply to be read", key, source=source) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{error.problem}{place}", key, source=source) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date with a 13th month
        reason = " ".join(str(error).split())
        raise ConfigError(f"is not readable YAML: {reason}", key, source=source) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: a file that is missing, unreadable, too large, no YAML, or no mapping.
    """
    source = str(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text", source=source) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        problem = f"cannot be read ({reason}); give the path of a YAML file"
        raise ConfigError(problem, source=source) from None
    data = parse_yaml(text, source)
    if not isinstance(data, dict):
        problem = f"must hold `key: value` lines, found {_kind(data)}"
        raise ConfigError(problem, source=source)
    return data


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, str]:
    """Writes `a.b=value` settings into `data`, in place; a later one wins.

    Args:
        data: the mapping from the file.
        overrides: as typed on the command line; each value is read as YAML.

    Returns:
        {dotted key: as typed} of what was set, sections that only the command line has included.

    Raises:
        ConfigError: a text that is no `key=value`, or a key below something that has no keys.
    """
    typed: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            problem = f"{show(override)} is not a setting; write key=value, such as seed=1"
            raise ConfigError(problem, source=COMMAND_LINE)
        value = parse_yaml(text, COMMAND_LINE, key)
        section = data
        for depth, part in enumerate(parts[:-1], 1):
            parent = ".".join(parts[:depth])
            if part not in section:
                section[part] = {}
                typed[parent] = override
            section = section[part]
            if not isinstance(section, dict):
                problem = f"cannot be set: {parent} is {show(section)}, not a section of keys"
                raise ConfigError(problem, key, source=COMMAND_LINE)
        section[parts[-1]] = value
        typed[key] = override
    return typed


def build(cls: type[ConfigT], data: dict[str, Any], source: str, typed: dict[str, str]) -> ConfigT:
    """A dataclass tree from plain data, every key and type checked.

    Args:
        cls: the dataclass of the whole configuration.
        data: plain data, overrides already in it.
        source: file that `data` came from.
        typed: what `apply_overrides` returned; errors in these keys name the command line.

    Raises:
        ConfigError: naming file or command line, full key, what is wrong and what to do.
    """
    try:
        return _build_section(cls, data, "", all_keys(cls))
    except ConfigError as error:
        key = error.key.partition("[")[0]
        from_typed = any(f"{key}.".startswith(f"{name}.") for name in typed)
        raise error.found_in(COMMAND_LINE if from_typed else source) from None


def _build_section(
    cls: type[ConfigT], data: dict[str, Any], path: str, every: list[str]
) -> ConfigT:
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for name in data:
        if name not in fields:
            name_text = name if isinstance(name, str) else show(name)
            raise _unknown(name_text, path, list(fields), every)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        key = f"{path}.{name}" if path else name
        if name in data:
            values[name] = _convert(hints[name], data[name], key, every)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError("is missing and has no default; add it", key)
    try:
        return cls(**values)
    except ConfigError as error:
        raise (error.below(path) if path else error) from None


def _unknown(name: str, path: str, valid: list[str], every: list[str]) -> ConfigError:
    key = f"{path}.{name}" if path else name
    if key in every:  # a dotted name, as overrides have it, used as a key of the file
        return ConfigError("a dotted key; in a file each part is a section of its own", key)
    near = nearest(name, valid)
    if near is not None:
        return ConfigError(f"unknown key; did you mean {path + '.' if path else ''}{near}?", key)
    elsewhere: dict[str, str] = {}
    for full in every:
        elsewhere.setdefault(full.rpartition(".")[2], full)
    near = nearest(name, list(elsewhere))
    if near is not None:
        return ConfigError(f"unknown key; did you mean {elsewhere[near]}?", key)
    return ConfigError(f"unknown key; the keys here are {', '.join(valid)}", key)


def _convert(hint: Any, value: Any, key: str, every: list[str]) -> Any:
    """`value` as the type `hint`, or a ConfigError that names both types."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _convert(hint, value, key, every)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build_section(hint, value, key, every)  # type: ignore[arg-type]
    if origin is Literal:
        choice = show(value) if isinstance(value, bool) else value  # YAML reads true as a bool
        if isinstance(choice, str) and choice in arguments:
            return choice
        near = nearest(choice, list(arguments)) if isinstance(choice, str) else None
        hint_text = f"; did you mean {near}?" if near else ""
        problem = f"is not one of {', '.join(arguments)}{hint_text}"
        raise ConfigError(problem, key, value)
    if origin in (list, tuple) and isinstance(value, list):
        if origin is tuple and len(value) != len(arguments):
            problem = f"must be a list of {len(arguments)} values, found {len(value)}"
            raise ConfigError(problem, key)
        items = arguments if origin is tuple else arguments * len(value)
        pairs = enumerate(zip(items, value, strict=True))
        return origin(_convert(item, part, f"{key}[{i}]", every) for i, (item, part) in pairs)
    if hint is float:
        number = _as_float(value)
        if number is not None:
            return number
        raise ConfigError(f"must be a finite number, found {_kind(value)}", key)
    if type(value) is hint:
        return value
    quotable = hint is str and not isinstance(value, (dict, list, type(None)))
    advice = "; put it in quotes" if quotable else ""
    raise ConfigError(f"must be {type_name(hint)}, found {_kind(value)}{advice}", key)


def _as_float(value: Any) -> float | None:
    """A finite float, also from an int and from 1e-6, which YAML 1.1 reads as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _kind(value: Any) -> str:
    kinds = {dict: "a section of keys", list: "a list", type(None): "null"}
    names = {str: "text", int: "an integer", float: "a number", bool: "a boolean"}
    if type(value) in kinds:
        return kinds[type(value)]
    return f"{names.get(type(value), 'a ' + type(value).__name__)} ({show(value)})"
