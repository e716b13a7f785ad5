"""Where prepared tokens lie: ``$XDG_CACHE_HOME/moe-workbench``, ``~/.cache/moe-workbench`` without it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from moe_core.data.corpus import DataError


def cache_root() -> Path:
    """The folder of the cache; it need not exist yet."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "moe-workbench"


def key_of(*parts) -> str:
    """A name for anything that JSON can say."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=10).hexdigest()


def write_whole(path: Path, write: Callable) -> None:
    """``write(file)``, a binary file, to ``path``: whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".partial-", delete=False) as file:
        try:
            write(file)
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


def unwritable(error: OSError) -> DataError:
    """The one line for a cache that cannot be written."""
    return DataError(f"cache folder = {str(cache_root())!r}: must be writable and have space "
                     f"({error.strerror or error}); XDG_CACHE_HOME names another place")
