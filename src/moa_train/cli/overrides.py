"""Reads Hydra overrides as a person writes them, and refuses what does not fit the composed configuration.

Hydra's own answers to a mistyped argument are long, and a value in plain YAML has no type that Hydra could hold an
override to. Here the defaults are the schema (`moa_train.cli.schema`).
"""

import re
from argparse import Namespace
from pathlib import Path
from typing import NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from moa_train.cli.schema import ArgumentError, Schema, nearest
from moa_train.cli.targets import refuse_foreign_targets

_KEY = re.compile(r"(\+\+?|~)?[\w./@:-]+")


def read_arguments(arguments: list[str], configs: Path, config_name: str) -> list[str]:
    """Checks a command line against the configuration it would run.

    Args:
        arguments: `sys.argv[1:]`: overrides and Hydra's own flags.
        configs: the absolute folder of configuration files.
        config_name: the config that the command composes.

    Returns:
        The arguments for Hydra: as given, with free text quoted (`prompt=a man <1>, smiling`, `ckpt=step=500.ckpt`).

    Raises:
        ArgumentError: an unknown flag, key or option; a value of the wrong kind; a required value that is not given.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False
    parser.error = _refuse_flag  # type: ignore[method-assign]
    args = parser.parse_args(arguments)
    configs = Path(args.config_path or configs)
    if not (configs.is_absolute() and configs.is_dir()):
        raise ArgumentError(f'--config-path expects the absolute path of a folder, got "{configs}"')
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            read = _CommandLine(args, configs, config_name).read()
    except (HydraException, OmegaConfBaseException) as error:
        raise ArgumentError(str(error)) from error
    return [read.get(argument, argument) for argument in arguments]


class _CommandLine:
    """One command line against one folder of configurations; used inside `initialize_config_dir`."""

    def __init__(self, args: Namespace, configs: Path, config_name: str) -> None:
        self.args = args
        self.configs = configs
        self.config_name = args.config_name or config_name
        self.loader = GlobalHydra.instance().config_loader()
        self.sweeps = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
        self.added = [] if args.config_dir is None else [f"hydra.searchpath=[{_quoted(_searched(args.config_dir))}]"]

    def read(self) -> dict[str, str]:
        """Refuses what is wrong; returns each override as Hydra is to read it, by how it was given."""
        self._check_config_name()
        overrides = {text: self._parse(text) for text in self.args.overrides}
        groups = self._groups()
        options = [line for line in overrides.values() if line.is_add() or line.key_or_group in groups]
        options = [line for line in options if self._options(line.key_or_group)]
        for override in options:
            self._check_option(override)
        schema = Schema(self._compose(options), self.configs)
        for text, override in overrides.items():
            if override not in options:
                overrides[text] = self._check_value(override, schema, groups)
        composed = self._compose(list(overrides.values()))
        refuse_foreign_targets(composed)
        missing = Schema(composed, self.configs).missing()
        if missing and self.args.cfg is None and self.args.info is None:
            more = f" (and {', '.join(missing[1:])})" if missing[1:] else ""
            raise ArgumentError(f"{missing[0]} is not given{more}: add {missing[0]}=VALUE; --help shows how")
        return {text: override.input_line or text for text, override in overrides.items()}

    def _compose(self, overrides: list[Override]) -> DictConfig:
        """The configuration of these overrides; of a sweep, its first job."""
        lines = [line for override in overrides if (line := _first_choice(override)) is not None]
        return compose(self.config_name, [*self.added, *lines], return_hydra_config=True)

    def _groups(self) -> list[str]:
        """The groups that the config chooses from: its defaults list."""
        try:
            return list(self._compose([]).hydra.runtime.choices)
        except ConfigCompositionException:  # a group without a default: every folder counts
            return self.loader.list_groups("")

    def _options(self, group: str) -> list[str]:
        return self.loader.get_group_options(group, ObjectType.CONFIG)

    def _check_config_name(self) -> None:
        names = self._options("")
        if self.config_name not in names and not self.added:
            raise ArgumentError(
                f'there is no config "{self.config_name}" in {self.configs}{nearest(self.config_name, names)}'
            )

    def _parse(self, text: str) -> Override:
        """One override; a value outside Hydra's grammar is taken as the text it is."""
        if "=" not in text and not text.startswith("~"):
            raise ArgumentError(f'"{text}" is not KEY=VALUE{self._option_named(text)}')
        try:
            override = OverridesParser.create(self.loader).parse_override(text)
        except HydraException as error:
            key, _, given = text.partition("=")
            if not _KEY.fullmatch(key):
                raise ArgumentError(f'"{key}" is not the name of a setting: expected KEY=VALUE') from error
            if given[:1] in ("'", '"', "{"):
                raise ArgumentError(f"cannot read {text}: are all quotes and braces closed?") from error
            return self._as_text(text)
        value = override.value()
        commas_in_text = isinstance(value, ChoiceSweep) and value.simple_form and not self.sweeps
        return self._as_text(text) if commas_in_text else override

    def _as_text(self, text: str) -> Override:
        """The override with its value quoted; of a list, each entry."""
        key, _, value = text.partition("=")
        entries = value[1:-1].split(",") if value[:1] == "[" and value[-1:] == "]" else None
        quoted = _quoted(value) if entries is None else f"[{','.join(_quoted(entry.strip()) for entry in entries)}]"
        return OverridesParser.create(self.loader).parse_override(f"{key}={quoted}")

    def _option_named(self, name: str) -> str:
        groups = [group for group in self.loader.list_groups("") if name in self._options(group)]
        return f"; did you mean {groups[0]}={name}?" if groups else ""

    def _check_option(self, override: Override) -> None:
        group, value, options = override.key_or_group, override.value(), self._options(override.key_or_group)
        chosen = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
        for option in chosen:
            name = option.text if isinstance(option, QuotedString) else option
            if isinstance(name, str) and name not in options and not override.is_delete() and not self.added:
                several = " (several need -m)" if "," in name else ""
                expected = f"expected one of {', '.join(options)}{nearest(name, options)}"
                raise ArgumentError(f'{group} has no option "{name}"{several}: {expected}')

    def _check_value(self, override: Override, schema: Schema, groups: list[str]) -> Override:
        key, value, known = override.key_or_group, override.value(), override.key_or_group in schema.defaults
        if key.split(".")[0] == "hydra":
            return override  # Hydra holds its own settings to its own types
        if not known and not override.is_add() and not override.is_force_add():
            raise ArgumentError(f"unknown setting {key}{nearest(key, [*schema.defaults, *groups])}")
        if not known or override.is_delete():
            return override
        if isinstance(value, ChoiceSweep) and self.sweeps:
            for item in value.list:
                schema.check(key, item.text if isinstance(item, QuotedString) else item)
        elif isinstance(value, IntervalSweep) and self.sweeps:
            for bound in (value.start, value.end):
                schema.check(key, bound)
        elif override.is_sweep_override() and not self.sweeps:
            raise ArgumentError(f"{override.input_line} gives several values: add -m to run each")
        elif not override.is_sweep_override():
            if schema.is_text(key) and type(value) in (bool, int, float):
                return self._as_text(str(override.input_line))  # name=7 is the text "7"
            schema.check(key, value)
        return override


def _first_choice(override: Override) -> str | None:
    """The override, or the first job of a sweep over it; None where only the sweeper knows its values."""
    if not override.is_sweep_override():
        return override.input_line
    if not override.is_discrete_sweep():
        return None
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _searched(folder: str) -> str:
    if not Path(folder).is_dir():
        raise ArgumentError(f'--config-dir expects a folder, got "{folder}"')
    return f"file://{Path(folder).resolve()}"


def _refuse_flag(message: str) -> NoReturn:
    raise ArgumentError(f"{message}; settings are KEY=VALUE, --help shows them")
