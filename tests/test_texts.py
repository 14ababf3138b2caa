"""Text and YAML as editors write them: encodings, numbers with exponents, repeated keys."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.search.spaces import SpaceError
from raysweep.search.spaces import load as load_space
from raysweep.storage.texts import TextError, decode, dump_yaml, load_yaml, read_text

FEW = settings(max_examples=50, deadline=None)  # no deadline: the machine may be busy


@FEW
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff")))
def test_encodings_with_a_byte_order_mark_are_read(text):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decode(text.encode(encoding), "f") == text
    assert decode(b"\xfe\xff" + text.encode("utf-16-be"), "f") == text


@FEW
@given(st.binary(max_size=40))
def test_other_bytes_are_refused_with_the_files_name(content):
    message = "notes.txt:1: read; save the file as UTF-8"
    try:
        decode(content, "notes.txt")
    except TextError as error:
        message = str(error)
    assert message.startswith("notes.txt:")
    assert message.endswith("save the file as UTF-8")


def test_the_message_names_line_and_column_of_an_undecodable_byte(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("name: a\n# un caf\u00e9\n".encode("cp1252"))
    with pytest.raises(
        ConfigError, match=r"c\.yaml:2: not UTF-8 text \(byte 0xe9 at column 9, which is '\u00e9' in Windows'"
    ):
        load(path)
    path.write_bytes("name: a\n".encode("utf-16-le"))
    with pytest.raises(ConfigError, match=r"c\.yaml: not text, or UTF-16 without a byte order mark; save the file"):
        load(path)
    path.write_bytes("name: umlaut\n# \u00e4\n".encode("utf-16"))
    assert load(path).name == "umlaut"
    with pytest.raises(TextError, match=r"none\.txt: No such file"):
        read_text(tmp_path / "none.txt")


@FEW
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["{:e}", "{:.0e}", "{:g}", "{!r}"]))
def test_numbers_are_read_in_every_format_of_programs(number, form):
    text = form.format(number)
    assert float(load_yaml(text)) == float(text)
    assert isinstance(load_yaml(text), int | float)


@pytest.mark.parametrize("text", ["1e-5", "1E5", "+1e-5", "-1e3", ".5e1", "1.e-3", "1.0e5"])
def test_exponents_are_numbers(text):
    assert load_yaml(f"[{text}]") == [float(text)]


@FEW
@given(st.recursive(st.text() | st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none(), st.lists))
def test_yaml_round_trip(data):
    assert load_yaml(dump_yaml({"a": data})) == {"a": data}
    assert load_yaml(dump_yaml({"key": "1e5"})) == {"key": "1e5"}


def test_numbers_with_exponents_in_configs_and_on_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "methods: [neggrad]\nspaces: {neggrad: {lr: {log: [1e-5, 1e-3]}, clip_norm: 1e0}}\nsearch: {trials: 2}\n"
    )
    sweep = load(path)
    assert sweep.spaces["neggrad"] == {"lr": {"log": [1e-5, 1e-3]}, "clip_norm": 1.0}
    assert load(path, ("spaces.neggrad.lr=3e-4",)).spaces["neggrad"]["lr"] == 3e-4
    assert load(path, ("spaces.neggrad.lr={log: [1e-6, 1e-4]}",)).spaces["neggrad"]["lr"] == {"log": [1e-6, 1e-4]}
    for ends in ("[.nan, 1e-3]", "[1e-3, .inf]"):
        with pytest.raises(SpaceError, match=r"spaces\.neggrad\.lr: the ends of a range are finite numbers"):
            load_space("neggrad", load(path, (f"spaces.neggrad.lr={{log: {ends}}}",)).spaces["neggrad"])


def test_a_repeated_key_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("search: {trials: 12}\nname: a\nsearch: {trials: 24}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:3: not valid YAML: the key 'search' occurs twice, first in line 1"):
        load(path)
    assert load_yaml("a: &x {k: 1}\nb: {<<: *x, k: 2}") == {"a": {"k": 1}, "b": {"k": 2}}
    with pytest.raises(yaml.YAMLError):
        load_yaml("a: [")


def test_text_that_yaml_reads_as_a_number_or_a_truth_value_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    for value in ("12e4", "007", "no"):
        path.write_text(f"name: {value}\n")
        with pytest.raises(ConfigError, match=r"c\.yaml:1: name: must be text; .* unless it is quoted"):
            load(path)
