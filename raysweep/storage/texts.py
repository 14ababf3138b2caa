"""Reads text and YAML as editors write them: several encodings, byte order marks, numbers such as 1e-5."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml

# UTF-32 before UTF-16, whose mark is a prefix of the other.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
# A number with an exponent, as in YAML 1.2 and every programming language; YAML 1.1 reads `1e-5` as text.
EXPONENT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")


class TextError(ValueError):
    """A file cannot be read as text; the message names file and line, and says what to do. line: from 1; 0 if unknown."""

    def __init__(self, message: str, line: int = 0):
        super().__init__(message)
        self.line = line


def decode(content: bytes, source: str) -> str:
    """Decodes UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises:
        TextError: other bytes, such as those of a legacy Windows code page; the message begins with `source`.
    """
    mark, encoding = next(((m, e) for m, e in MARKS if content.startswith(m)), (b"", "utf-8"))
    content = content[len(mark) :]
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        before = content[: error.start].decode(encoding, errors="replace")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        byte = content[error.start]
        legacy = bytes([byte]).decode("cp1252", errors="ignore") if encoding == "utf-8" else ""
        guess = f", which is {legacy!r} in Windows' cp1252" if legacy.isprintable() and legacy else ""
        raise TextError(
            f"{source}:{line}: not {encoding.upper()} text (byte 0x{byte:02x} at column {column}{guess}); "
            "save the file as UTF-8",
            line,
        ) from error
    if "\0" in text:
        raise TextError(f"{source}: not text, or UTF-16 without a byte order mark; save the file as UTF-8")
    return text


def read_text(path: Path) -> str:
    """Reads a text file; raises TextError if it cannot be read or decoded."""
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise TextError(f"{path}: {error.strerror or error}") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the numbers of YAML 1.2, in which a repeated key of a mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and first.setdefault(key.value, line) != line:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice, first in line {first[key.value]}", key.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_Loader` would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789."))


def load_yaml(text: str) -> Any:
    """The plain data of a YAML document; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # safe: _Loader is a SafeLoader


def dump_yaml(data: Any) -> str:
    """A YAML document that `load_yaml` reads back as `data`, in the order of its keys."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)
