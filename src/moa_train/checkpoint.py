"""Personalized weights on disk: the trained tensors and where they come from, in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT, VERSION = "moa_train.personalized", 1
REQUIRED = ("moa", "prior", "step")
"""Metadata of every export: the MoAConfig's values, the prior's identity, the optimizer steps taken."""
LOCAL = "<local>"
"""Stands in the metadata for the folders of a path on the machine where the export was made."""

_METADATA_KEY = "moa_train"


def atomic_write(path: str | os.PathLike[str], writer: Callable[[Path], object]) -> None:
    """Let `writer` fill a temporary file beside `path`, flush it to the disk, then rename it over `path`.

    A kill at any moment leaves either the old file or the new one; an exception leaves the old one and no temporary.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(temporary)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def export_personalized(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Write trained tensors with their metadata, atomically; equal tensors and metadata give equal bytes.

    Args:
        path: a `.safetensors` file. state: tensors by name. metadata: JSON values, at least those in `REQUIRED`.

    Returns:
        The metadata with what is added to it: format, version, dtype.
    """
    missing = [key for key in REQUIRED if key not in metadata]
    if missing:
        raise ValueError(f"the metadata of an export lacks {', '.join(missing)}")
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    told = {**metadata, "format": FORMAT, "version": VERSION, "dtype": "+".join(dtypes)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata={_METADATA_KEY: json.dumps(told)}))
    return told


def load_personalized(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `export_personalized` wrote.

    Raises:
        ValueError: no such file, not a whole safetensors file, or not one of this project's exports; says what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the .safetensors file that moa-export wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_METADATA_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        if _is_pickle(path):
            raise ValueError(
                f"{path} is a PyTorch or pickle file, which may run code when it is read: give the .safetensors file "
                f"that moa-export ckpt={path} writes"
            ) from error
        raise ValueError(f"{path} is not a whole safetensors file ({error}): export or download it again") from error
    return state, _checked(path, header)


def _is_pickle(path: Path) -> bool:
    """Whether a file that is no safetensors file begins as torch.save's archives or as a pickle does."""
    with path.open("rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _checked(path: Path, header: str | None) -> dict[str, Any]:
    if header is None:
        raise ValueError(f"{path} has no {_METADATA_KEY!r} metadata: give the .safetensors file that moa-export wrote")
    try:
        metadata = json.loads(header)
    except json.JSONDecodeError as error:
        raise ValueError(f"the metadata of {path} are not JSON ({error}): export or download it again") from error
    given = metadata if isinstance(metadata, dict) else {}
    if given.get("format") != FORMAT or given.get("version") != VERSION:
        told = f"{given.get('format')} version {given.get('version')}"
        raise ValueError(f"{path} is {told}, this program reads {FORMAT} version {VERSION}: export it again")
    missing = [key for key in REQUIRED if key not in given]
    if missing:
        raise ValueError(f"the metadata of {path} lacks {', '.join(missing)}: export it again")
    return given
