"""Validate plain YAML or JSON by pydantic, and report its mistakes in one paragraph that names each key.

Numbers may be written unreduced, with their reason: `lr: 1.5e-4 * 4096 / 256`.
"""

import ast
import operator
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from milan.core.errors import UserError, nearest

MOST_REPORTED = 5  # mistakes of a file
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 100


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Section:
    """Base of all validated dataclasses: frozen, unknown keys forbidden, `conflicts` checked once each field is valid."""

    def conflicts(self) -> Iterable[str]:
        """Yield each contradiction between fields."""
        return ()

    @model_validator(mode="after")
    def refuse_conflicts(self):
        if conflicts := list(self.conflicts()):
            raise ValueError(*conflicts)
        return self


def number(value: Any) -> Any:
    """Return the value of a sum, and a whole float as an int (a strict float accepts ints too)."""
    if isinstance(value, str):
        value = arithmetic(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and value.bit_length() > 1000:
        raise ValueError(f"a whole number of {value.bit_length()} bits is more than any setting takes")
    return value


Int = Annotated[int, Strict(), BeforeValidator(number)]
Float = Annotated[float, Strict(), BeforeValidator(number)]
Bool = Annotated[bool, Strict()]


def must(rule: Callable[[Any], Any] | str, text: str) -> AfterValidator:
    """Return a validator that refuses a value by `text`, whose {} stands for it, unless rule(value) or the pattern holds."""
    holds = re.compile(rule).fullmatch if isinstance(rule, str) else rule

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(text.format(value))
        return value

    return AfterValidator(check)


def is_text(text: str) -> bool:
    """Return whether a text can be written to a file in UTF-8 and be part of a path: JSON and YAML also hold halves of
    characters ("\\ud800") and NUL."""
    return not re.search("[\0\ud800-\udfff]", text)


Text = Annotated[str, Strict(), must(is_text, "{!a} holds characters that no text has")]


def arithmetic(text: str) -> float:
    """Return the value of an expression of numbers, + - * / and parentheses. Raises ValueError for anything else."""
    operations = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        return operations[type(node.op)](value(node.left), value(node.right))

    try:
        return value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError, MemoryError):
        raise ValueError(f"{text[:100]!r} is no number and no sum or product of numbers") from None


def validate(kind: type, tree: Any, where: str) -> Any:
    """Return plain YAML or JSON as a `kind` of Section. Raises UserError naming `where`, each key at fault and its mend."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        mistakes = [text for fault in error.errors(include_url=False) for text in explain(kind, fault)]
    mistakes = list(dict.fromkeys(mistakes))
    if (rest := len(mistakes) - MOST_REPORTED) > 0:
        mistakes[MOST_REPORTED:] = [f"And {rest} more"]
    raise UserError(f"{where}: {'. '.join(mistakes)}.".replace("?.", "?"))


def explain(kind: type, fault: dict) -> list[str]:
    """Return one of pydantic's errors in our words, each sentence behind its dotted key."""
    path, context, given = fault["loc"], fault.get("ctx", {}), SHORT.repr(fault["input"])
    if of_key := path[-1:] == ("[key]",):  # of a dictionary, whose errors stand at (..., key, "[key]")
        path = path[:-2]
    match fault["type"]:
        case "value_error":
            texts = context["error"].args
        case "missing":
            *path, _ = path
            missing = [name for name in keys_at(kind, path) if name not in fault["input"]]
            texts = [f"missing key {', '.join(missing)} (compare conf/scale/demo.yaml)"]
        case "unexpected_keyword_argument" | "invalid_key":
            *path, name = path
            names = keys_at(kind, path)
            texts = [f"unknown key {name!r}{nearest(name, names)}. Valid keys: {', '.join(names)}"]
        case "string_type" if of_key:
            texts = [f"the name {given} is no word to YAML; put it in quotation marks"]
        case "dataclass_type":
            texts = [f"expected a section with keys {', '.join(keys_at(kind, path))}, found {given}"]
        case "literal_error":
            options = re.findall("'(.*?)'", context["expected"])
            texts = [f"{given} is not one of {', '.join(options)}{nearest(fault['input'], options)}"]
        case "too_short" | "too_long":
            length = context.get("min_length") or context["max_length"]
            texts = ["an empty list; give at least one" if length == 1 else f"expected {length} numbers, found {given}"]
        case "finite_number":
            texts = [f"{given} is no finite number"]
        case "int_type" | "float_type" | "bool_type" | "string_type" | "list_type" | "dict_type" as name:
            texts = [f"expected {name.removesuffix('_type')}, found {given}"]
        case _:
            texts = [f"{given} must be {BOUNDS[rule]} {bound}" for rule, bound in context.items() if rule in BOUNDS]
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
    return [f"{place}: {text}" if place else text for text in texts or [fault["msg"]]]


def keys_at(kind: type, path: Iterable) -> list[str]:
    """Return the valid keys of the section at a path."""
    for key in path:
        kind = get_type_hints(kind)[key] if is_dataclass(kind) else get_args(kind)[-1]
        kind = get_args(kind)[0] if type(None) in get_args(kind) else kind  # of an optional section
    return [field.name for field in fields(kind)]
