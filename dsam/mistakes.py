"""What a mistake in a setting is called: one line with its path, its value and the nearest name."""

import re
import types
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from .errors import UserError, did_you_mean


def described(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first mistake that pydantic found, as one line with its path, value and the nearest name."""
    first = _first(error.errors())
    return _line(first, schema, [part for part in first["loc"] if not _is_branch(part)])


def _first(errors: list[ErrorDetails]) -> ErrorDetails:
    """Of a union's mistakes that of the side that came furthest into the value, as only the one that was meant does;
    of a group's an unknown key, which may be what is missing, misspelt."""
    first = errors[0]
    if _is_refused(first):
        union = first["loc"][:-1]
        of_it = [error for error in errors if error["loc"][: len(union)] == union]
        first = max(of_it, key=lambda error: (len(error["loc"]), not _is_refused(error)))
    if first["type"] == "missing":
        unknown = (e for e in errors if e["type"] == "extra_forbidden" and e["loc"][:-1] == first["loc"][:-1])
        first = next(unknown, first)
    return first


def _is_refused(error: ErrorDetails) -> bool:
    """Whether one side of a union takes no value of this type."""
    return error["type"].endswith("_type") and bool(error["loc"]) and _is_branch(error["loc"][-1])


def _is_branch(part: int | str) -> bool:
    """Whether a part of an error's place is not a setting but pydantic's name for one side of a union."""
    return isinstance(part, str) and (part in ("str", "File") or "[" in part or part.startswith("function-"))


def _line(error: ErrorDetails, schema: type[BaseModel], place: list[int | str]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"'{path}' is not set"
    if kind == "extra_forbidden":
        return f"unknown key '{path}'; {did_you_mean(str(place[-1]), _fields(schema, place[:-1]))}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{path or 'configuration'} must be a group of settings, not {value!r}"
    if kind == "kind":
        also = "".join(f" or {word}" for word in _words(schema, place))
        return f"'{path}' must be {error['msg']}{also}, not {'null' if value is None else repr(value)}"
    if kind == "said":
        return error["msg"].format(path=path, value=value, value_repr=repr(value))
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        return f"unknown {path} '{value}'; {did_you_mean(str(value), known)}"
    if kind in ("tuple_type", "list_type"):
        return f"'{path}' must be a list, e.g. [{value}], not {value!r}"
    if kind == "string_type":
        return f"'{path}' must be text, not {value!r}: put it in quotes"
    if kind == "string_pattern_mismatch":
        return f"{path}='{value}' must be letters, digits and _ . + -, since folders are named after it"
    limits = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("above", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("below", "lt"),
    }
    if kind in limits:
        words, name = limits[kind]
        limit = context[name]
        return f"{path}={_shown(value)} must be {words} {limit:g}"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}"


def _shown(value: Any) -> Any:
    """A number as the setting holds it: 1e-5 is 1e-05, whether it was text or not."""
    return float(value) if isinstance(value, str) else value


def _annotation(schema: type[BaseModel], place: list[int | str]) -> Any:
    found: Any = schema
    for part in place:
        inside = (_inside(kind, part) for kind in alternatives(found))
        found = next((kind for kind in inside if kind is not None), None)
    return found


def _inside(kind: Any, part: int | str) -> Any:
    """The kind of what a value of this kind has at `part`; None where it has no such part."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_fields[part].annotation if part in kind.model_fields else None
    of_key, of_place = get_origin(kind) is dict, get_origin(kind) in (list, tuple)
    if of_key and isinstance(part, str):
        return get_args(kind)[1]
    return get_args(kind)[0] if of_place and isinstance(part, int) else None


def alternatives(annotation: Any) -> tuple:
    union = get_origin(annotation) in (types.UnionType, Union)
    return get_args(annotation) if union else (annotation,)


def _fields(schema: type[BaseModel], place: list[int | str]) -> list[str]:
    kinds = alternatives(_annotation(schema, place))
    return [
        name for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel) for name in kind.model_fields
    ]


def _words(schema: type[BaseModel], place: list[int | str]) -> list[str]:
    """What a setting may be beside its kind, e.g. auto or null."""
    kinds = alternatives(_annotation(schema, place))
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    return words + (["null"] if type(None) in kinds else [])


def coerced(value: Any, kind: Any, path: str) -> Any:
    """`value` as a setting of this kind. UserError names the path."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "kind":
            null = " or null" if type(None) in alternatives(kind) else ""
            shown = "null" if value is None else repr(value)
            raise UserError(f"'{path}' must be {first['msg']}{null}, not {shown}") from None
        raise UserError(_line(first, BaseModel, [path])) from None


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)
