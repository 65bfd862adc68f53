"""What leaves the machine with an export: its metadata without secrets, local paths and logging accounts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moa_train.checkpoint import LOCAL

REMOVED = "<removed>"
"""Stands for a value that looks like a credential."""

PLACES = ("logger", "runs", "run_dir", "run_id", "ckpt", "debug")
"""Settings that say where a run lay and where its numbers went, not how the weights came about: left out."""

_HOMES = (["home"], ["Users"])
"""What is below is a person's name."""
_SECRET_WORD = re.compile(
    r"(^|[_.\-])(token|secrets?|passwords?|passwd|credentials?|auth|api_?keys?|access_?keys?|private_?keys?)($|[_.\-])",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(hf|gh[oprsu]|github_pat|glpat|sk|wandb)[_-][\w-]{16,}"  # Hugging Face, GitHub, GitLab, OpenAI, wandb
    r"|\bAKIA[0-9A-Z]{16}\b"  # Amazon
    r"|\b[0-9a-f]{40}\b"  # wandb's older keys
    r"|\bBearer\s+\S+",
    re.IGNORECASE,
)
_URL = re.compile(
    r"\b(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<user>[^/@\s]*@)?(?P<rest>[^\s?#\"']*)[^\s\"']*", re.IGNORECASE
)
_OUTSIDE = r"(?:~[\w.-]*|[A-Za-z]:|\.\.)?[\\/]"
"""How a path begins that leads out of the working folder."""
_WHOLE_PATH = re.compile(rf"{_OUTSIDE}[^,;:|\n]*")
_PATH_WITHIN = re.compile(rf"(?<![\w.>/\\~-]){_OUTSIDE}[^\s,;:|\"'(){{}}\[\]]*")


def without_private(value: Any) -> Any:
    """A copy of JSON values that may be shown to anybody; applied again it changes nothing.

    The rule: settings in `PLACES` and settings whose name speaks of a secret (token, password, api_key ...) are left
    out; text that looks like a credential becomes `<removed>`; a URL loses user, password and query; of a path that
    leads out of the working folder (`/`, `~`, `..`, `C:`) the last part stays, as `<local>/NAME`. Other paths, hub ids
    and all else stay as they are.
    """
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if key not in PLACES and not _SECRET_WORD.search(str(key))}
        return {_without_private_text(str(key)): without_private(item) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [without_private(item) for item in value]
    return _without_private_text(value) if isinstance(value, str) else value


def _without_private_text(text: str) -> str:
    text = _SECRET_VALUE.sub(REMOVED, text)
    if _WHOLE_PATH.fullmatch(text):  # may hold spaces
        return _last_part(text)
    pieces, rest = [], 0
    for url in _URL.finditer(text):
        pieces += [_PATH_WITHIN.sub(_local, text[rest : url.start()]), _public(url)]
        rest = url.end()
    return "".join(pieces) + _PATH_WITHIN.sub(_local, text[rest:])


def _public(url: re.Match[str]) -> str:
    if url["scheme"].lower() == "file":
        return _last_part(url["rest"])
    return f"{url['scheme']}://{url['rest']}"


def _local(path: re.Match[str]) -> str:
    return _last_part(path[0])


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[\\/]", path) if part not in ("", ".", "..")]
    nameless = not parts or parts[-1].startswith("~") or parts[-1].endswith(":") or parts[-2:-1] in _HOMES
    return LOCAL if nameless else f"{LOCAL}/{parts[-1]}"
