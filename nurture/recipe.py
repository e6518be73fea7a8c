"""Typed configuration: YAML in, frozen sections out, and every mistake named with file, line, key and remedy.

A *section* is a frozen pydantic class; the docstring under a field is its help text. A *document* is the plain data
of one YAML file that remembers on which line each key stands, so that a complaint about `stages.1.lerning_rate`, from
whichever class, points at the place to mend. All mistakes of a file are reported at once. Overrides given on the
command line (`pretrain.optimizer.learning_rate=1e-3`) are laid over the document and checked by the same rules.

The YAML read here is YAML 1.2's core: `1e-3` is a number, `no` and `010` are a word and ten, not False and eight.
This file knows nothing of stages; what a recipe contains is pipeline.py's business.
"""

from __future__ import annotations

import os
import re
import sysconfig
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from nurture.errors import NurtureError, did_you_mean

KeyPath = tuple[str | int, ...]
"""Where a value stands in a document: ("stages", 1, "learning_rate")."""


# --- sections -------------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """Base of every configuration section: frozen, unknown keys refused, attribute docstrings shown in help.

    Where a section has defaults of its own for a nested one (`schedule: ScheduleConfig = ScheduleConfig(final=0.1)`), a
    recipe that sets one key of it leaves the others as they were. Only where it chooses another kind (`chosen_by`) do
    the others go: they were meant for the kind they came with.
    """

    chosen_by: ClassVar[str | None] = None
    """Field that decides what the others mean."""
    same_in_other_words: ClassVar[tuple[str, ...]] = ()
    """Fields that say one thing in several ways: a default's way goes when a recipe says it in another."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _own_defaults_under_nested_sections(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        defaults = {name: info.default for name, info in cls.model_fields.items() if name in data}
        nested = {
            name: default._under(data[name])
            for name, default in defaults.items()
            if isinstance(default, Section) and isinstance(data[name], dict)
        }
        return {**data, **nested}

    def _under(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return what is given, over what this section sets itself (not all that its class has defaults for)."""
        chosen = self.chosen_by
        if chosen is not None and given.get(chosen, getattr(self, chosen)) != getattr(self, chosen):
            return given
        said = not set(self.same_in_other_words).isdisjoint(given)
        hidden = self.same_in_other_words if said else ()
        return {name: getattr(self, name) for name in self.model_fields_set if name not in hidden} | given

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values_as_numbers(cls, data: Any) -> Any:
        # Python counts True as 1, so `layers: true` would pass. As a word it fails with the usual message.
        if not isinstance(data, dict):
            return data
        return {
            key: str(value).lower() if isinstance(value, bool) and not _takes_bool(cls, key) else value
            for key, value in data.items()
        }


_SCALES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "b": 10**9,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
}
_MINUTES = {"": 1.0, "s": 1 / 60, "m": 1.0, "min": 1.0, "h": 60.0, "d": 1440.0}
_QUANTITY = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_count(value: Any) -> Any:
    """Read a count such as `10M`, `2.5B`, `4k` (thousands), `4Ki` (1024s) or a plain number."""
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value)
    if not match or match[2].lower() not in _SCALES:
        raise ValueError("should be a count such as 4000, 4k, 2.5M or 1B")
    count = float(match[1].replace("_", "")) * _SCALES[match[2].lower()]
    if count != round(count):
        raise ValueError("should come to a whole number")
    return round(count)


def parse_minutes(value: Any) -> Any:
    """Read a duration in minutes: a plain number, or one with a unit: `90s`, `10m`, `2h`, `1d`."""
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value)
    if not match or match[2].lower() not in _MINUTES:
        raise ValueError("should be minutes, or a duration such as 90s, 10m or 2h")
    return float(match[1].replace("_", "")) * _MINUTES[match[2].lower()]


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number that may be written `10M`, `2.5B` or `4k`."""

Minutes = Annotated[float, BeforeValidator(parse_minutes)]
"""A duration in minutes that may be written `90s`, `10m` or `2h`."""

Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole."""


# --- documents ------------------------------------------------------------------------------------------------------


@dataclass
class Document:
    """The plain data of one YAML file (or of a command line), with the place of every key and a list of complaints.

    Attributes:
        name: what the messages call the file.
        data: nested dicts, lists and scalars.
        places: key path -> "FILE:LINE" or "override 'key=value'".
        spellings: key path -> how an override spelled it, where that differs from the path.
        problems: complaints so far, each with the place it sorts by.
    """

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    spellings: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[tuple[int, int], str]] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """Return where `path` was written, or where its nearest known parent was."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.places.get((), self.name)

    def spelling(self, path: KeyPath) -> str:
        """Return the key as the user would write it: dotted, or as in the override it came from."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.spellings:
                words = (self.spellings[path[:length]], *map(str, path[length:]))
                return ".".join(filter(None, words))  # a stage command spells its stage as nothing
        return ".".join(map(str, path))

    def complain(self, path: KeyPath, message: str) -> None:
        """Note a mistake about the key at `path`."""
        place = self.place(path)
        spelling = self.spelling(path)
        key = f"key '{spelling}': " if spelling else ""
        line = place.rsplit(":", 1)[-1]
        order = (0, int(line)) if line.isdigit() else (1, 0)
        self.problems.append((order, f"{place}: {key}{message}"))

    def get(self, path: KeyPath) -> Any:
        """Return the value at `path`, or None where the document has none."""
        value: Any = self.data
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def raise_problems(self) -> None:
        """Raise all noted mistakes as one error, in the order of the file.

        Raises:
            NurtureError: there are any.
        """
        if self.problems:
            lines = dict.fromkeys(message for _, message in sorted(self.problems, key=lambda item: item[0]))
            raise NurtureError("\n".join(lines))


def read_document(path: Path, *, name: str | None = None) -> Document:
    """Read a YAML file.

    Args:
        name: what messages call it, the path if not given.

    Raises:
        NurtureError: the file is missing, unreadable or not YAML, or its top is not a mapping.
    """
    name = name or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NurtureError(f"{name}: no such file.{_near_file(path)}") from error
    except IsADirectoryError as error:
        raise NurtureError(f"{name}: is a folder, expected a recipe file (YAML).") from error
    except UnicodeDecodeError as error:
        raise NurtureError(
            f"{name}: is not UTF-8 text (byte {error.start}), expected a recipe (YAML)."
        ) from error
    except OSError as error:
        raise NurtureError(f"{name}: cannot be read ({error.strerror}).") from error
    return parse_document(text, name)


def parse_document(text: str, name: str) -> Document:
    """Parse YAML text into a document. Same errors as `read_document`."""
    document = Document(name)
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise NurtureError(f"{name}:{line}: not valid YAML: {_yaml_problem(error)}.") from error
    except yaml.YAMLError as error:
        raise NurtureError(f"{name}: not valid YAML: {str(error).splitlines()[0]}.") from error
    if node is None:
        raise NurtureError(f"{name}: is empty, expected a recipe: see `nurture run --help` for an example.")
    if not isinstance(node, yaml.MappingNode):
        raise NurtureError(
            f"{name}:{node.start_mark.line + 1}: expected 'key: value' lines at the top of the file."
        )
    document.places[()] = f"{name}:1"
    document.data = _build(node, (), document, parents=())
    return document


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    """Say what the parser found; the two commonest mistakes, in words that do not need its grammar."""
    problem = error.problem or ""
    if "'\\t'" in problem:
        return "a tab. Indent with spaces"
    if "expected <block end>" in problem:
        return "this line does not stand in line with those it belongs to. Indent it as they are"
    return f"{error.context or ''} {problem}".strip()


def apply_overrides(
    document: Document, overrides: Sequence[str], roots: Mapping[str, KeyPath], known: Iterable[str] = ()
) -> None:
    """Lay `key.path=value` settings over a document; mistakes are noted in it.

    Args:
        overrides: for example `pretrain.schedule.decay=0.2`; the value is read as YAML.
        roots: first word of a key -> the path it stands for (`pretrain` -> ("stages", 0)).
        known: first words that stand for themselves, for the hint when a word is neither.
    """
    for text in overrides:
        key, equals, value_text = text.partition("=")
        if not equals or not key.strip():
            raise NurtureError(
                f"override '{text}': expected key=value, for example pretrain.optimizer.learning_rate=1e-3."
            )
        first, *rest = key.strip().split(".")
        choices = [*roots, *known]
        if first not in choices:
            hint = did_you_mean(first, choices) or f" Known: {', '.join(choices)}."
            document.problems.append(
                ((1, 0), f"override '{text}': nothing in {document.name} is called '{first}'.{hint}")
            )
            continue
        path: KeyPath = roots.get(first, (first,))
        for part in rest:
            path = (*path, int(part) if part.isdigit() and isinstance(document.get(path), list) else part)
        document.places[path] = f"override '{text}'"
        document.spellings[path] = key.strip()
        value = _override_value(document, path, value_text)
        if value is not _UNREADABLE:
            _assign(document, path, value)


_UNREADABLE = object()


def _override_value(document: Document, path: KeyPath, text: str) -> Any:
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "cannot be parsed"
        document.complain(path, f"the value is not valid YAML: {problem}. Quote it if it is meant as text.")
        return _UNREADABLE
    if node is None:
        return None
    scratch = Document(document.name)
    value = _build(node, (), scratch, parents=())
    for _, message in scratch.problems:
        document.complain(path, message.split(": ", 1)[-1])
    return value


def _assign(document: Document, path: KeyPath, value: Any) -> None:
    """Set `path` to `value`, making the sections in between."""
    container: Any = document.data
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(container, list):
            if not isinstance(part, int) or part >= len(container):
                document.complain(
                    path, f"'{part}' is not a place in a list of {len(container)} (they count from 0)"
                )
                return
        elif isinstance(container, dict):
            if not last and container.get(part) is None:
                container[part] = {}
        else:
            document.complain(path, f"'{path[depth - 1]}' is a single value here, it has no '{part}' inside")
            return
        if last:
            container[part] = value
        else:
            container = container[part]


# --- checking a document against sections ---------------------------------------------------------------------------

S = TypeVar("S", bound=BaseModel)


def check(section: type[S], document: Document, path: KeyPath = (), *, data: Any = None) -> S | None:
    """Build a section from the data at `path`, noting every mistake in the document.

    Args:
        data: the data to use instead of what stands at `path` (derived from it, so that places still fit).

    Returns:
        The section, or None when there was a mistake.
    """
    value = document.get(path) if data is None else data
    if value is None:
        value = {}
    try:
        return section.model_validate(value)
    except ValidationError as failure:
        for error in failure.errors(include_url=False):
            where = (*path, *_path_in(value, error["loc"], error["type"]))
            document.complain(where, _explain(error, section, where[len(path) :]))
        return None


def _path_in(data: Any, loc: Sequence[str | int], kind: str) -> KeyPath:
    """Keep the parts of pydantic's location that are keys of the data; the rest names branches of unions."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        in_dict = isinstance(data, dict) and part in data
        if in_dict or (isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data)):
            data = data[part]
        elif not (kind == "missing" and index == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _explain(error: Any, section: type[BaseModel], path: KeyPath) -> str:
    """Say what pydantic found wrong in the words of this project."""
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"unknown key.{_nearest_key(section, path)}"
    if kind == "missing":
        about = " ".join((_description(section, path) or "").split())
        return f"is required and missing{f': {about}' if about else ''}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    message = message.replace("Input should", "should").split(", unable to parse")[0]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = f"should be a section of 'key: value' lines{_example(section, path)}"
    if isinstance(value, (dict, BaseModel)):
        return f"{message}."
    hint = ""
    if kind == "literal_error":
        hint = did_you_mean(
            str(value), re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
        )
    return f"{message}, got {_show(value)}.{hint}"


def _example(section: type[BaseModel], path: KeyPath) -> str:
    """Return a setting of the section that was expected, for one who only wants it on (`lora=true`)."""
    for inner in _sections_at(section, path):
        for name, info in inner.model_fields.items():
            if type(info.default) in (int, float, str):
                return f" or one of its settings, such as {path[-1]}.{name}={info.default}"
    return ""


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest_key(section: type[BaseModel], path: KeyPath) -> str:
    """Return the hint for an unknown key: the nearest key of its section, or one deeper inside it."""
    word = str(path[-1])
    candidates = list(_sections_at(section, path[:-1]))
    here = {key for candidate in candidates for key in candidate.model_fields}
    deep: dict[str, str] = {}
    for candidate in candidates:
        for name, dotted in _nested_keys(candidate):
            deep.setdefault(name, dotted)
    if word in deep:
        return f" Did you mean '{deep[word]}'?"
    hint = did_you_mean(word, here) or did_you_mean(word, deep)
    if hint and (name := hint.split("'")[1]) not in here:
        hint = f" Did you mean '{deep[name]}'?"
    return hint or f" Known keys: {', '.join(sorted(here))}."


def _nested_keys(section: type[BaseModel], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (key, dotted key) of the sections inside a section, nearest first; not those in lists and mappings."""
    direct = [
        (key, inner)
        for key, info in section.model_fields.items()
        if typing.get_origin(info.annotation) not in (list, tuple, dict)
        for inner in _section_classes(info.annotation)
    ]
    for key, inner in direct:
        yield from ((name, f"{prefix}{key}.{name}") for name in inner.model_fields)
    for key, inner in direct if depth < 2 else ():
        yield from _nested_keys(inner, f"{prefix}{key}.", depth + 1)


def _description(section: type[BaseModel], path: KeyPath) -> str | None:
    for candidate in _sections_at(section, path[:-1]):
        info = candidate.model_fields.get(str(path[-1]))
        if info is not None:
            return info.description
    return None


def _sections_at(section: type[BaseModel], path: KeyPath) -> Iterator[type[BaseModel]]:
    """Yield the section classes that may stand at `path` inside `section`."""
    if not path:
        yield section
        return
    info = section.model_fields.get(str(path[0]))
    rest = path[1:]
    while rest and isinstance(rest[0], int):  # an index of a list of sections
        rest = rest[1:]
    for inner in _section_classes(info.annotation if info else None):
        yield from _sections_at(inner, rest)
        if rest:  # or the key of a mapping of sections
            yield from _sections_at(inner, rest[1:])


def _section_classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the section classes named anywhere in a type annotation."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _section_classes(argument)


def _takes_bool(section: type[BaseModel], key: str) -> bool:
    """Say whether a field accepts truth values (or anything); unknown keys are left to the usual complaint."""
    info = section.model_fields.get(key)
    return (
        info is None
        or info.annotation is Any
        or "bool" in str(info.annotation)
        or "Any" in str(info.annotation)
    )


# --- YAML -----------------------------------------------------------------------------------------------------------


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core types: the ones people mean."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}  # not the parent's: those are YAML 1.1's


_INT = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)"
)
for _tag, _pattern, _first in (
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("int", re.compile(rf"(?:{_INT.pattern})\Z"), "-+0123456789"),
    ("float", re.compile(rf"(?:{_FLOAT.pattern})\Z"), "-+.0123456789"),
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))


def _build(node: yaml.Node, path: KeyPath, document: Document, parents: tuple[yaml.Node, ...]) -> Any:
    """Turn a YAML node into plain data, noting the place of each key."""
    if node in parents:
        document.complain(path, "an alias inside its own anchor")
        return None
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(node, path, document, (*parents, node))
    if isinstance(node, yaml.SequenceNode):
        values = []
        for index, item in enumerate(node.value):
            where = (*path, index)
            document.places[where] = f"{document.name}:{item.start_mark.line + 1}"
            values.append(_build(item, where, document, (*parents, node)))
        return values
    return _scalar(node, path, document)


def _build_mapping(node: yaml.Node, path: KeyPath, document: Document, parents: tuple[yaml.Node, ...]) -> Any:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            unnamed = (*path, "?")
            document.places[unnamed] = f"{document.name}:{line}"
            document.complain(unnamed, "a key should be a single word")
            continue
        key = str(key_node.value)
        where = (*path, key)
        if key in mapping:
            first = document.places[where].rsplit(":", 1)[-1]
            document.places[where] = f"{document.name}:{line}"
            document.complain(where, f"given twice, first on line {first}. Keep one of them.")
            continue
        document.places[where] = f"{document.name}:{line}"
        mapping[key] = _build(value_node, where, document, parents)
    return mapping


def _scalar(node: yaml.Node, path: KeyPath, document: Document) -> Any:
    kind, text = node.tag.rsplit(":", 1)[-1], node.value
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, 16) if text.startswith("0x") else int(text.replace("_", ""))
        if kind == "float":
            return float(re.sub(r"\.(?=[iInN])", "", text.replace("_", "")))
    except ValueError:
        document.complain(path, f"'{text}' is not a {kind}")
        return None
    if kind != "str":
        document.complain(path, f"the tag '{node.tag}' is not understood. Write plain values.")
        return None
    return _expand_variables(text, path, document)


# The running Python's standard library is text that every machine has.
_OWN_VARIABLES = {"NURTURE_STDLIB": sysconfig.get_path("stdlib")}
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _expand_variables(text: str, path: KeyPath, document: Document) -> str:
    """Replace `${NAME}` and `${NAME:-default}` by environment variables."""

    def value_of(match: re.Match[str]) -> str:
        value = os.environ.get(match[1]) or _OWN_VARIABLES.get(match[1]) or match[2]
        if value is None:
            document.complain(
                path, f"the environment variable {match[1]} is not set. Export it, or write the value."
            )
            return match[0]
        return value

    return _VARIABLE.sub(value_of, text)


def _near_file(path: Path) -> str:
    try:
        return did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        return ""
