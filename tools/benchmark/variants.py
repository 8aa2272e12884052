"""Variants of a config in words, KEY=VALUE KEY=VALUE ..., for `--compare` of the planner and the benchmarks."""

import re
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from diversedit_jax import config as configs
from diversedit_jax import registry
from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import flat


def varied(
    config: ConfigDict,
    words: str,
    others: Mapping[str, Callable[[str], Any]] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[ConfigDict, dict[str, Any]]:
    """A copy of the config with the values in `words`, and the values of the keys in `others`.

    others: key -> parser of its text, for keys that are not in the config.
    overrides: changes by --config.KEY=VALUE. The first word may be `config=FILE`: another file, with these overrides.
    """
    others, found = others or {}, {}
    config = configs.copied(config)
    for place, word in enumerate(words.split()):
        key, given, text = word.partition("=")
        try:
            if key == "config" and given and not place:
                config = from_file(text)
                _update(config, overrides or {})
                continue
            known = {*flat(config.to_dict()), *others}
            if not given or key not in known:
                wanted = registry.suggestion(key, sorted(known))
                raise ConfigError(f"--compare={words}: {word!r}: wanted KEY=VALUE; {wanted}")
            if key in others:
                found[key] = others[key](text)
            else:
                _update(config, {key: cli.literal(text)})
        except (AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
            raise ConfigError(f"--compare={words}: {word!r}: {error}") from error
    return config, found


def _update(config: ConfigDict, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key not in flat(config.to_dict()):
            raise KeyError(f"{key} is not in this config")
        config.update_from_flattened_dict({key: value})


def from_file(name: str) -> ConfigDict:
    """The config of `FILE` or `FILE:ARGUMENT`, the form of --config."""
    path, _, argument = name.partition(":")
    return runpy.run_path(path)["get_config"](*([argument] if argument else []))


def overrides() -> dict[str, Any]:
    """The changes by --config.KEY=VALUE on the command line."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def of_flags() -> dict[str, ConfigDict]:
    """--config and each --compare by their names in a table: the file of the config, the words."""
    given = flags.FLAGS
    path, _, argument = config_flags.get_config_filename(given["config"]).partition(":")
    found = {":".join(filter(None, (Path(path).stem, argument))): given.config}
    changed = overrides()
    for words in given.compare:
        name = re.sub(r"^config=\S*?(\w+)\.py", r"\1", words)
        if name in found:
            raise ConfigError(f"--compare={words} : the table has this row already")
        found[name] = varied(given.config, words, overrides=changed)[0]
    return found
