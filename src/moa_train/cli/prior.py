"""`prior=` as people write it: an option of the config group, or a Stable Diffusion folder or hub id."""

from __future__ import annotations

from pathlib import Path


def prior_paths_as_source(arguments: list[str], configs: Path) -> list[str]:
    """Turns `prior=/a/folder` and `prior=owner/name` into `prior.source=...`; options and everything else stay.

    A value with a slash, or one that names an existing folder, is a path; commas separate the values of a sweep.
    """
    options = {path.stem for path in (configs / "prior").glob("*.yaml")}

    def is_path(value: str) -> bool:
        return value not in options and ("/" in value or Path(value).is_dir())

    rewritten = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        paths = key == "prior" and all(is_path(each.strip("\"'")) for each in value.split(","))
        rewritten.append(f"prior.source={value}" if paths else argument)
    return rewritten
