"""A composed configuration as its own schema: which keys exist, and which kind of value each takes."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a mapping"}


class ArgumentError(ValueError):
    """A command line that cannot be run; the message says what was given, what was expected and what to do."""


class Unknown:
    """Stands for a value that only a run can resolve; it takes anything."""


class Schema:
    """The keys of a configuration without Hydra's own, and their defaults.

    A value is of its default's kind; an integer also serves as a number. A default of null or `auto`, or one that is
    missing or unresolved, takes anything. A comment that names `null` or `auto` beside a key allows that word.
    """

    def __init__(self, cfg: DictConfig, configs: Path) -> None:
        self.defaults = _defaults(cfg)
        self.configs = configs

    def missing(self) -> list[str]:
        """The keys that still are `???`."""
        return [key for key, value in self.defaults.items() if value == "???"]

    def is_text(self, key: str) -> bool:
        """Whether `key` takes text only."""
        return isinstance(self.defaults[key], str) and self.defaults[key] not in ("auto", "???")

    def check(self, key: str, value: Any) -> None:
        """Raises `ArgumentError` unless `value` is of the kind that `key` takes; the key is known."""
        self._check(key, value, self.defaults[key])

    def _check(self, key: str, value: Any, default: Any) -> None:
        if default is Unknown or default in (None, "auto", "???") or (isinstance(value, str) and "${" in value):
            return
        if value in (None, "auto") and self._comment_names(key, "null" if value is None else "auto"):
            return
        kind = type(default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            expected = f"{key} expects {_KINDS[kind]} (its default is {_shown(default)})"
            raise ArgumentError(f"{expected}, got {_shown(value)}{_advice(key, kind, value)}")
        if isinstance(value, dict) and default:
            for entry, item in value.items():
                if entry not in default:
                    raise ArgumentError(f"unknown setting {key}.{entry}{nearest(str(entry), map(str, default))}")
                self._check(f"{key}.{entry}", item, default[entry])
        if isinstance(value, list) and default:
            for item in value:
                self._check(key, item, default[0])

    def _comment_names(self, key: str, word: str) -> bool:
        line = re.compile(rf"^[ -]*{re.escape(key.rsplit('.', 1)[-1])}:.*#.*\b{word}\b", re.MULTILINE)
        return any(line.search(path.read_text()) for path in self.configs.rglob("*.yaml"))


def nearest(given: str, valid: Iterable[str]) -> str:
    """`'; did you mean x?'`, or nothing where no valid name is near. The last part of a dotted name counts for it."""
    valid = list(valid)
    last = given.rsplit(".", 1)[-1]
    by_last: dict[str, list[str]] = {}
    for name in valid:
        by_last.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    close = get_close_matches(given, by_last.get(last, []), n=1, cutoff=0) or get_close_matches(given, valid, n=1)
    if not close:
        close = [by_last[part][0] for part in get_close_matches(last, by_last, n=1, cutoff=0.75)]
    return f"; did you mean {close[0]}?" if close else ""


def _defaults(cfg: DictConfig) -> dict[str, Any]:
    """Every dotted key with its value as plain Python; `Unknown` where an interpolation does not resolve yet."""
    found: dict[str, Any] = {}

    def walk(node: DictConfig, prefix: str) -> None:
        for name in node:
            key = f"{prefix}{name!s}"
            if key == "hydra":
                continue
            try:
                value = "???" if OmegaConf.is_missing(node, name) else node[name]
            except OmegaConfBaseException:
                value = Unknown
            found[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            if isinstance(value, DictConfig):
                walk(value, f"{key}.")

    walk(cfg, "")
    return found


def _advice(key: str, kind: type, value: Any) -> str:
    if kind is list and isinstance(value, (str, int, float)):
        return f": write {key}=[{value}]"
    if isinstance(value, str) and "," in value:
        return ": to run several values one after another, add -m"
    return ""


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, Mapping)):
        return str(value) if len(str(value)) < 60 else f"{len(value)} entries"
    return f'"{value}"' if isinstance(value, str) else str(value)
