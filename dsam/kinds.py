"""Kinds of settings: coerced, so that 1 and 1.0 (or "1e-5" and 0.00001) are one configuration."""

import math
import os
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # what no name or path needs and files break on
LARGEST = 3.4e38  # of float32
SEEDS = 2**43  # times a million and three, as epochs are ordered by, they are within PyTorch's seeds
MOST_AT_ONCE = 1024  # threads, or runs: more is a slip of the keyboard


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        raise PydanticCustomError("kind", "a whole number")
    if abs(value) >= 2**63:
        raise PydanticCustomError("said", "{path}={value} must be below 2^63")
    return int(value)


def _number(value: Any) -> Any:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number) and abs(number) > LARGEST:
        raise PydanticCustomError("said", f"{{path}}={number} must be within float32, ±{LARGEST}")
    if not math.isfinite(number):
        raise PydanticCustomError("kind", "a finite number")
    return number


def _text(value: Any) -> Any:
    if isinstance(value, float):  # of a file: what it was written as is lost (86e12345 is infinite)
        raise PydanticCustomError("said", "'{path}' must be text, not the number {value}: put it in quotes")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PydanticCustomError("kind", "text")
    if CONTROL.search(str(value)):
        raise PydanticCustomError("said", "'{path}' holds a control character or broken UTF-8: {value_repr}")
    return str(value)


def _home(path: str) -> str:
    """A shell leaves the ~ of data.root=~/glue as it is. A user that there is not stays as typed, to be named."""
    return os.path.expanduser(path)


def _yes(value: Any) -> Any:
    if not isinstance(value, bool):
        raise PydanticCustomError("kind", "true or false")
    return value


def _group(value: Any) -> Any:
    if not isinstance(value, dict):
        raise PydanticCustomError("kind", "a group of settings")
    for key in value:
        if not isinstance(key, str):
            raise PydanticCustomError("said", f"'{{path}}': the name {key!r} must be text")
    return value


def listed(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("kind", "a list")
    return value


def pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PydanticCustomError("kind", "a list of two")
    return tuple(value)


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Text = Annotated[str, BeforeValidator(_text)]
Folder = Annotated[str, BeforeValidator(lambda value: _home(_text(value)))]
Yes = Annotated[bool, BeforeValidator(_yes)]
Group = Annotated[dict[str, Any], BeforeValidator(_group)]
AtLeast0 = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, lt=SEEDS)]
AtLeast1 = Annotated[Whole, Field(ge=1)]
AtOnce = Annotated[Whole, Field(ge=1, le=MOST_AT_ONCE)]
NotNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Proportion = Annotated[Number, Field(ge=0, le=1)]
