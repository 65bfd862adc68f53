"""Where the configuration files are: inside an installed package, or at the top of the repository."""

from pathlib import Path


def config_dir() -> Path:
    """The folder of configuration files: `moa_train/configs` of a wheel, else `configs/` of the working copy.

    Raises:
        FileNotFoundError: neither exists (a broken installation).
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parents[1] / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no configuration files beside {package}: install moa-train again")
