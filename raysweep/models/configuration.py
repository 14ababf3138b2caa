"""Settings beside a model's tensors that its output depends on, as plain data for its hash.

Only what a class takes by name, and sets otherwise than by default, counts. So versions of the libraries, paths and other notes that
saving leaves in a configuration do not change a model's hash, nor does a new setting of a later version at its default.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from raysweep.storage.files import digest_of

NEUTRAL = ("use_cache", "return_dict_in_generate", "transformers_version")  # of generation; they change no answer
KINDS = ("image_processor_type", "processor_class", "feature_extractor_type")


def network_settings(net: Any) -> dict[str, Any]:
    """Class and settings of a network of diffusers or transformers; the class alone of one without a configuration."""
    config = getattr(net, "config", None)
    settings = {}
    if isinstance(config, Mapping):  # of diffusers
        settings = _chosen(type(net), config)
    elif config is not None:
        settings = _of_transformers(config)
    return {"class": type(net).__name__, **settings}


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Class and settings of a scheduler of diffusers."""
    return {"class": type(scheduler).__name__, **_chosen(type(scheduler), scheduler.config)}


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Hash of the rules and the vocabulary of a tokenizer of transformers, its length and its padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        rules: Any = [tokenizer.get_vocab(), list(map(list, getattr(tokenizer, "bpe_ranks", ())))]
    else:  # truncation and padding are those of the last call
        state = json.loads(backend.to_str())
        rules = {key: part for key, part in state.items() if key not in ("version", "truncation", "padding")}
    return {
        "rules": digest_of(rules),
        "length": tokenizer.model_max_length,
        "padding": [tokenizer.pad_token_id, tokenizer.padding_side],
        "cut": tokenizer.truncation_side,
    }


def processor_settings(processor: Any) -> dict[str, Any]:
    """Settings of an image processor, or of a processor with one inside."""
    settings: dict[str, Any] = plain(processor.to_dict())
    inner = settings.get("image_processor")
    if isinstance(inner, dict):
        settings["image_processor"] = {key: value for key, value in inner.items() if key not in KINDS}
    return {key: value for key, value in settings.items() if key not in KINDS}


def generation_settings(net: Any) -> dict[str, Any]:
    """Settings of a language model's generation that differ from the library's."""
    settings = plain(net.generation_config.to_diff_dict())
    return {k: v for k, v in settings.items() if k not in NEUTRAL and not k.startswith(("_", "output_"))}


def plain(value: Any) -> Any:
    """A setting as JSON data in which equal settings are written alike: 1 and 1.0, tuples and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return int(value) if float(value).is_integer() else float(value)
    return str(value)


def _chosen(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a class that differ from its defaults."""
    values = {name: plain(config[name]) for name in _defaults(kind) if name in config}
    return {name: value for name, value in values.items() if value != _defaults(kind)[name]}


def _of_transformers(config: Any) -> dict[str, Any]:
    """The settings of a configuration, and of those inside it, without what all configurations of the library have."""
    kind: Any = type(config)
    common, settings = _defaults(_base(kind)), dict[str, Any]()
    for name, default in _defaults(kind).items():
        value = getattr(config, name, None)
        if hasattr(value, "to_diff_dict"):
            settings[name] = {"class": type(value).__name__, **_of_transformers(value)}
        elif name not in common and plain(value) != default:
            settings[name] = plain(value)
    return settings


def _base(kind: Any) -> Any:
    """The class of the library that all its configurations derive from."""
    return next(base for base in reversed(kind.__mro__) if hasattr(base, "to_diff_dict"))


@cache
def _defaults(kind: Any) -> dict[str, Any]:
    """Named arguments of a class and their defaults, as plain data; an argument without one has the empty object."""
    parameters = inspect.signature(kind.__init__).parameters
    return {
        name: {} if p.default is inspect.Parameter.empty else plain(p.default)
        for name, p in parameters.items()
        if name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
