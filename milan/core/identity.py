"""What a result follows from besides code: the values of the recipe in use, and the inputs by their content."""

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

from milan.core.errors import UserError
from milan.core.files import file_digest, json_digest


@dataclass(frozen=True)
class Identity:
    """{dotted key or input: value or digest}, every value as text. Equal identities mean equal results of equal code."""

    values: dict[str, str]

    @property
    def digest(self) -> str:
        """16 hex digits."""
        return json_digest(self.values)

    def differences(self, earlier: dict[str, str]) -> str:
        """Say what differs from an earlier identity's values, the first five keys."""
        missing = "not set"
        keys = [key for key in sorted(self.values.keys() | earlier.keys()) if self.values.get(key) != earlier.get(key)]
        said = [f"{key} is {self.values.get(key, missing)}, was {earlier.get(key, missing)}" for key in keys[:5]]
        return "; ".join(said) + (f"; and {len(keys) - 5} more" if len(keys) > 5 else "")


def identify(sections: dict[str, object], inputs: dict[str, Path | str]) -> Identity:
    """Return the identity of a result.

    sections: {name: section of the recipe, or a plain value}; inputs: {name: file, digested here, or a digest}. Raises
    UserError where an input is missing."""
    values = {key: repr(value) for name, section in sections.items() for key, value in flatten(section, name).items()}
    for name, source in inputs.items():
        values[f"input {name}"] = file_digest(present(source)) if isinstance(source, Path) else source
    return Identity(values)


def flatten(value, name: str = "") -> dict:
    """Return a tree of sections (dataclasses) and dicts as {"section.key": value}."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if not isinstance(value, dict):
        return {name: value}
    prefix = f"{name}." if name else ""
    return {key: leaf for child, part in value.items() for key, leaf in flatten(part, f"{prefix}{child}").items()}


def present(path: Path) -> Path:
    """Return the path of a file or folder that an earlier stage made. Raises UserError where there is none."""
    if not path.exists():
        raise UserError(f"{path} is missing: an earlier stage makes it. Run `dvc repro`, which runs the stages in order.")
    return path
