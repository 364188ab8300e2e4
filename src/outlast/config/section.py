"""How a section of the configuration declares its keys, and how values are checked against a declaration.

A key is declared once: type, range and unit in its annotation, its meaning in the docstring below. From that come the
check (pydantic's), the words of a refusal, the JSON schema and the reference of all keys (`reference.py`). Importing
this module does not import pydantic, which takes 0.1 s; the first check does.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from outlast.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, TypeAdapter


class Section:
    """Base of all sections: dataclasses that accept no unknown key and no infinite number."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "allow_inf_nan": False,
        "coerce_numbers_to_str": True,  # run.name=7 is the name "7"
    }

    gone: ClassVar[dict[str, str]] = {}
    """Keys that there once were, or might be, with what to say instead."""
    private: ClassVar[bool] = False
    """Whether a value that is refused may be a secret, and is kept out of the message."""

    @classmethod
    @cache
    def adapter(cls) -> "TypeAdapter[Self]":
        """What checks values against the declaration, and knows its JSON schema."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls)


S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Number:
    """The unit and the range of a number. What `annotated_types` has for this takes 20 ms to import."""

    unit: str = ""
    _: KW_ONLY
    ge: float | None = None
    gt: float | None = None
    lt: float | None = None
    le: float | None = None

    def bounds(self) -> dict[str, float]:
        return {name: bound for name in ("ge", "gt", "lt", "le") if (bound := getattr(self, name)) is not None}

    def __get_pydantic_core_schema__(self, base: Any, handler: "GetCoreSchemaHandler") -> Any:
        return dict(handler(base)) | self.bounds()

    def words(self, base: type) -> str:
        """What is valid: `a whole number of seconds, 5 or more`."""
        noun = "number" if base is float else "whole number" if self.unit else "integer"
        article = "an" if noun == "integer" else "a"
        noun += f" of {self.unit}" if self.unit else ""
        match self.bounds():
            case {"ge": low, "lt": high}:
                return f"{article} {noun} from {low} to below {high}"
            case {"ge": low, "le": high}:
                return f"{article} {noun} from {low} to {high}"
            case {"gt": low, "lt": high}:
                return f"{article} {noun} between {low} and {high}"
            case {"ge": low}:
                return f"{article} {noun}, {low} or more"
            case {"gt": 0}:
                return f"a positive {noun}"
        return f"{article} {noun}"


@dataclass(frozen=True)
class Passes:
    """A test of a value (what fails it is false, or a ValueError), and the words for what passes it."""

    test: Callable[[Any], Any]
    valid: str

    def __get_pydantic_core_schema__(self, base: Any, handler: "GetCoreSchemaHandler") -> Any:
        from pydantic_core.core_schema import no_info_after_validator_function

        return no_info_after_validator_function(self._passed, handler(base))

    def words(self, base: type) -> str:
        return self.valid

    def _passed(self, value: Any) -> Any:
        if not self.test(value):
            raise ValueError(self.valid)
        return value


def require(ok: bool, key: str, value: Any, valid: str) -> None:
    """Refuse a value (ConfigError) unless `ok`."""
    if not ok:
        raise ConfigError(key, value, valid)


def section(name: str, schema: type[S], values: dict[str, Any]) -> S:
    """One section from plain values, checked. An empty name stands for the configuration as a whole.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, or one that the class refuses.
    """
    from pydantic import ValidationError

    keys = declared(schema)
    prefix = f"{name}." if name else ""
    for key, value in values.items():
        if isinstance(value, bool) and keys.get(key, bool) is not bool:  # pydantic would take it for the number 1
            raise ConfigError(prefix + key, value, f"valid: {words(keys[key])}")
        if isinstance(value, float) and key in keys and accepts_text(keys[key]):  # 1e5 would be named 100000.0
            raise ConfigError(prefix + key, value, f"valid: {words(keys[key])}; put it in quotes")
    try:
        return schema.adapter().validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        if key in schema.gone:
            raise ConfigError(prefix + key, "…" if schema.private else values[key], schema.gone[key]) from None
        if key not in keys:
            place = f"{name}={values['kind']}" if {"kind"} <= keys.keys() & values.keys() else name
            names = [known for known in keys if known != "kind"]
            raise ConfigError(place or "configuration", key, names or "it has no keys of its own") from None
        if first["type"] == "literal_error":
            raise ConfigError(prefix + key, first["input"], choices(keys[key])) from None
        given = "…" if schema.private else values[key]
        raise ConfigError(prefix + key, given, f"valid: {words(keys[key])}") from None


def declared(schema: type) -> dict[str, Any]:
    """The keys of a section with their annotations."""
    return {field.name: field.type for field in fields(schema)}


def accepts_text(annotation: Any) -> bool:
    """Whether a key accepts any text, beside null."""
    if get_origin(annotation) in (Union, UnionType):
        options = [option for option in get_args(annotation) if option is not NoneType]
        return all(map(accepts_text, options))
    return annotation is str or (get_origin(annotation) is Annotated and get_args(annotation)[0] is str)


def choices(annotation: Any) -> tuple[str, ...]:
    """The names that a key accepts, alone or in a list."""
    arguments = get_args(annotation)
    return arguments if get_origin(annotation) is Literal else choices(arguments[0])


def words(annotation: Any) -> str:
    """What a key accepts: `a whole number of seconds, 5 or more, or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return ", or ".join(words(option) for option in arguments)
    if origin is Literal:
        return ", ".join(sorted(arguments))
    if origin is list:
        return "a list of texts" if arguments == (str,) else f"a list of: {words(arguments[0])}"
    if origin is dict:
        return "a section with keys of its own"
    if origin is Annotated:
        return str(arguments[1].words(arguments[0]))
    if annotation in (int, float):
        return Number().words(annotation)
    return {str: "text", bool: "true or false", NoneType: "null"}[annotation]
