"""What a configuration may name to be built: classes of this package, and of a few libraries.

A configuration travels: in folders, checkpoints and records of a step. `_target_` would let it run anything that can be
imported, so each is judged by its name before anything of it is imported.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moa_train.cli.schema import ArgumentError

MORE = "MOA_TRAIN_TARGETS"
"""Environment variable: packages of the user's own, separated by commas, whose objects may be built, too."""

_LIBRARIES = re.compile(
    r"torch\.optim\.[A-Z]\w*"
    r"|pytorch_lightning\.Trainer"
    r"|pytorch_lightning\.(callbacks|loggers|profilers|strategies|plugins(\.(environments|io|precision))?)\.[A-Z]\w*"
)
"""Classes that these packages show at their top: no path through a module to what it has imported."""

_HYDRA = re.compile(
    r"((hydra\._internal\.core_plugins|hydra_plugins)(\.[a-z_]+)*|optuna\.(samplers|pruners))\.[A-Z]\w*"
)
"""Hydra's launchers and sweepers, and Optuna's parts, below the key `hydra` alone; Hydra refuses what is no plugin."""

_LOGGING = re.compile(r"(logging(\.handlers)?|colorlog)\.[A-Z]\w*")
"""What Hydra's own logging configuration may build."""

_LOGGING_KEY = re.compile(r"hydra\.(job|hydra)_logging\.")

_RESOLVER = re.compile(r"\$\{[\w.]+:")
"""A value that a function makes, perhaps a whole node; one that points to another node is judged where that stands."""

_OWN = "moa_train"
_NEVER = ("cli", "data.sources")
"""Parts of this package that run what a text names; no configuration builds them, Hydra's plugins in cli excepted."""


def refuse_foreign_targets(cfg: DictConfig) -> None:
    """Judges every `_target_` of a configuration, those for Hydra itself included.

    Raises:
        ArgumentError: one that is not allowed, by its key.
    """
    for key, target in _targets(cfg, OmegaConf.to_container(cfg), ()):
        full = cfg._get_full_key(key)
        if not _is_allowed(target, full):
            raise ArgumentError(
                f"{full}={target} is refused: a configuration builds classes and functions of moa_train, torch.optim "
                f"and pytorch_lightning alone; allow a package of your own by the environment variable {MORE}=PACKAGE"
            )


def _targets(cfg: DictConfig, node: Any, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(key below `cfg`, name) of all that `node`, a part of it in plain Python, would build."""
    key = ".".join(names)
    if isinstance(node, (dict, list)):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _targets(cfg, value, (*names, str(name)))
    elif names and (names[-1] == "_target_" or (names[-1] in ("class", "()") and _LOGGING_KEY.match(key))):
        yield key, str(OmegaConf.select(cfg, key))
    elif isinstance(node, str) and _RESOLVER.search(node):
        try:
            made = OmegaConf.select(cfg, key)
        except OmegaConfBaseException:  # known to a job only, which is judged before it builds
            return
        if OmegaConf.is_config(made):
            yield from _targets(cfg, OmegaConf.to_container(made), names)


def _is_allowed(target: str, key: str) -> bool:
    for_hydra = key.startswith("hydra.")
    if for_hydra and (_HYDRA if key.endswith("_target_") else _LOGGING).fullmatch(target):
        return True
    own = [package.strip() for package in os.environ.get(MORE, "").split(",") if package.strip()]
    if any(target.startswith(f"{package}.") for package in own):
        return True
    return _LIBRARIES.fullmatch(target) is not None or _is_defined_here(target, for_hydra)


def _is_defined_here(target: str, for_hydra: bool) -> bool:
    """Whether a module of this package itself defines that class or function; found in its text, without an import."""
    if re.fullmatch(rf"{_OWN}(\.[a-z_]+)+\.[A-Za-z]\w*", target) is None:
        return False
    module, _, name = target.removeprefix(f"{_OWN}.").rpartition(".")
    if not for_hydra and any(module == part or module.startswith(f"{part}.") for part in _NEVER):
        return False
    path = Path(__file__).resolve().parents[1].joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return False
    kinds = (ast.ClassDef,) if for_hydra else (ast.ClassDef, ast.FunctionDef)
    return any(isinstance(node, kinds) and node.name == name for node in ast.parse(path.read_text()).body)
