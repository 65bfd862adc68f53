"""The frame of every command: one place that turns Hydra into the contract with our users.

Hydra composes the configuration, sweeps and writes the run's folder. This module adds what a person at a terminal
needs: a hand-written `--help` that starts at once, and mistakes answered in one line that says what was given, what was
expected and what to do (exit code 2, no traceback; `debug=true` shows it). A command is a config, a text, a function:

    # moa_train/cli/train.py
    from moa_train.cli.command import command

    HELP = '''\
    Train MoA on shards of subjects and masks.

      moa-train                            the toy world, on this machine
      moa-train experiment=ffhq_sd15       the paper's set-up

    Experiments: {experiment}
    '''

    def run(cfg: DictConfig) -> None:      # import torch and the like in here, so that --help stays quick
        ...

    main = command("train", help=HELP, run="moa_train.cli.train:run")

`{experiment}` in the text becomes the options of that config group. The config (here `configs/train.yaml`) has a key
`debug: false`.
"""

import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from moa_train import __version__
from moa_train.cli.paths import config_dir

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
_DEBUG = " (debug=true shows where)"


def command(
    config_name: str, *, help: str, run: str, name: str | None = None, folder: Path | None = None
) -> Callable[[], None]:
    """The `main` of one command: no arguments (it reads `sys.argv`), leaves through `SystemExit` on errors.

    Args:
        config_name: the config to compose, without `.yaml`.
        help: what `--help` prints; `{group}` becomes the options of that config group.
        run: `"package.module:function"`, imported when the configuration is sound. It takes the composed `DictConfig`.
            A `ValueError` or `OSError` that it raises is the user's to mend and told in one line; anything else is our
            mistake and keeps its traceback.
        name: the command's name in messages; `moa-<config_name>` unless given.
        folder: the folder of configuration files; the package's own unless given.
    """
    name = name or f"moa-{config_name}"

    def main() -> None:
        arguments = sys.argv[1:]
        debug = "debug=true" in (argument.lower() for argument in arguments)
        with told_in_one_line(name, debug):
            configs = folder or config_dir()
            if {"-h", "--help"} & set(arguments):
                print(_fill_in(help, configs), end="" if help.endswith("\n") else "\n")
            elif "--version" in arguments:
                print(f"{name} {__version__}")
            else:
                _start(name, config_name, configs, run)

    return main


def command_group(name: str, *, help: str, commands: Mapping[str, Callable[[], None]]) -> Callable[[], None]:
    """The `main` of a command of commands (`moa-data toy ...`): the first argument chooses which one runs.

    The chosen one sees `sys.argv` without its own name. Give each `command(..., name="moa-data toy")`.
    """

    def main() -> None:
        chosen = sys.argv[1] if len(sys.argv) > 1 else "--help"
        if chosen in commands:
            del sys.argv[1]
            commands[chosen]()
        elif chosen in {"-h", "--help"}:
            print(help, end="" if help.endswith("\n") else "\n")
        elif chosen == "--version":
            print(f"{name} {__version__}")
        else:
            from moa_train.cli.schema import nearest

            expected = f"expected one of {', '.join(commands)}"
            fail(name, f'unknown command "{chosen}": {expected}{nearest(chosen, commands)}')

    return main


def _start(name: str, config_name: str, configs: Path, run: str) -> None:
    """Checks the arguments, then gives them to Hydra, which calls `run` once, or once a job of a sweep."""
    import hydra

    from moa_train.cli.overrides import read_arguments

    sys.argv[1:] = read_arguments(sys.argv[1:], configs, config_name)  # Lightning's launcher starts ranks from sys.argv
    hydra.main(version_base="1.3", config_path=str(configs), config_name=config_name)(_Job(name, run))()


class _Job:
    """What Hydra calls with a configuration. A class, so that launchers can send it to other processes."""

    def __init__(self, name: str, run: str) -> None:
        self.name = name
        self.run = run
        self.__module__ = run.split(":")[0]  # Hydra names the job after it

    def __call__(self, cfg: Any) -> Any:
        with told_in_one_line(self.name, debug=bool(cfg.get("debug", False))):
            module, function = self.run.split(":")
            return getattr(import_module(module), function)(cfg)


@contextmanager
def told_in_one_line(name: str, debug: bool) -> Iterator[None]:
    """Turns a user's mistake into one line and exit code 2, an interrupt into one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        if debug:
            traceback.print_exc()
        fail(name, mistake)


def _mistake(error: Exception) -> str | None:
    """What the user can mend, if `error` is of that sort; None if the error is ours."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    from moa_train.cli.schema import ArgumentError

    if isinstance(error, ArgumentError):
        return str(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not given: add {error.full_key}=VALUE; --help shows how"
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        key = re.search(r"full_key: (\S+)", str(error))
        told = isinstance(error.__cause__, (TypeError, ImportError)) or _is_told(error.__cause__)
        return f"{key[1] if key else 'config'}: {error.__cause__}{_DEBUG}" if told else None
    if isinstance(error, (HydraException, OmegaConfBaseException)) or _is_told(error):
        return f"{error or type(error).__name__}{_DEBUG}"
    return None


def _is_told(error: BaseException) -> bool:
    """Bad values, missing files, and what Lightning calls a misconfiguration (no such accelerator, say)."""
    lightning = "MisconfigurationException" in (kind.__name__ for kind in type(error).__mro__)
    return isinstance(error, (ValueError, OSError)) or lightning


def fail(name: str, message: str) -> NoReturn:
    """One line on stderr and exit code 2."""
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USAGE_ERROR)


def _fill_in(text: str, configs: Path) -> str:
    """Replaces `{group}` by the options of that config group; other braces stay."""

    def options(match: re.Match[str]) -> str:
        names = sorted(path.stem for path in (configs / match[1]).glob("*.yaml"))
        return ", ".join(names) or match[0]

    return re.sub(r"\{([a-z_]+(?:/[a-z_]+)*)\}", options, text)
