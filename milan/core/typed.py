"""Plain YAML as typed, frozen dataclasses, every value checked against its field's rules; errors name the key.

Rules are a field's metadata: "options" (one of these words), "above", "least", "most", "below" (bounds), and of lists
"length", "some", "distinct", "ordered".
"""

import ast
import dataclasses
import difflib
import operator
import types
import typing
from dataclasses import field

from milan.core.errors import UserError


def choice(*options):
    """Field of one of these words."""
    return field(metadata={"options": options})


def build(kind, value, where: str):
    """`value` (plain YAML) as `kind`, which is a dataclass or a type annotation built of plain types."""
    if dataclasses.is_dataclass(kind):
        return build_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return build(next(a for a in arguments if a is not type(None)), value, where)
    if origin in (list, dict) and not isinstance(value, origin):
        raise UserError(f"{where}: expected a {origin.__name__}, found {value!r}.")
    if origin is list:
        return [build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        for name in value:
            if not isinstance(name, str):
                raise UserError(f"{where}: the name {name!r} is no word to YAML; put it in quotation marks.")
        return {name: build(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    return build_plain(kind, value, where)


def build_dataclass(kind, value, where: str):
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a section with keys {', '.join(field_names(kind))}, found {value!r}.")
    names = field_names(kind)
    for name in value:
        if name not in names:
            raise UserError(f"{where}: unknown key {name!r}{nearest(name, names)}. Valid keys: {', '.join(names)}.")
    missing = [name for name in names if name not in value]
    if missing:
        raise UserError(f"{where}: missing key {', '.join(missing)}. Compare conf/scale/demo.yaml.")
    hints = typing.get_type_hints(kind)
    built = {f.name: build_field(f, hints[f.name], value[f.name], f"{where}:{f.name}") for f in dataclasses.fields(kind)}
    try:
        return kind(**built)
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from None


def build_field(spec, kind, value, where: str):
    built = build(kind, value, where)
    if built is not None:
        check(built, spec.metadata, where)
    return built


def build_plain(kind, value, where: str):
    if kind in (int, float) and isinstance(value, str):
        value = arithmetic(value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e308 else float("inf")
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind if isinstance(kind, type) else object) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: expected {getattr(kind, '__name__', kind)}, found {value!r}.")
    if kind is int and abs(value) >= 1e308:
        raise UserError(f"{where}: a whole number of {value.bit_length()} bits is more than any setting takes.")
    if kind is float and not abs(value) < float("inf"):
        raise UserError(f"{where}: {value} is no finite number.")
    return value


def check(value, rules, where: str) -> None:
    """Raise UserError unless a value, or each value of a list, keeps to its field's rules."""
    if isinstance(value, list):
        if rules.get("some") and not value:
            raise UserError(f"{where}: an empty list; give at least one.")
        if rules.get("distinct") and len(set(value)) < len(value):
            raise UserError(f"{where}: {value} names one of them twice.")
        if len(value) != rules.get("length", len(value)):
            raise UserError(f"{where}: expected {rules['length']} numbers, found {value}.")
        if rules.get("ordered") and sorted(value) != value:
            raise UserError(f"{where}: {value} must not fall: the smallest comes first.")
        for i, item in enumerate(value):
            check(item, rules, f"{where}[{i}]")
        return
    tests = {
        "above": (operator.gt, "above"),
        "least": (operator.ge, "at least"),
        "most": (operator.le, "at most"),
        "below": (operator.lt, "below"),
    }
    for rule, bound in rules.items():
        if rule == "options" and value not in bound:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, bound))}{nearest(str(value), bound)}.")
        if rule in tests and not tests[rule][0](value, bound):
            raise UserError(f"{where}: {value} must be {tests[rule][1]} {bound}.")


def arithmetic(text: str, where: str) -> float:
    """Value of an expression of numbers, + - * / and parentheses."""
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
        raise UserError(f"{where}: {text[:100]!r} is no number and no sum or product of numbers.") from None


def field_names(kind) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def nearest(word: str, words) -> str:
    """'; did you mean X?' or nothing."""
    found = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
