"""Where stores live: the default path, and whether a folder is on a network file system.

Knows the platform; must not know SQLite.
"""

import os
import sys
from pathlib import Path

from tether.errors import StoreError

_FILE_NAME = "reference-log-probs.sqlite"
_NETWORK_FILE_SYSTEMS = {
    *(
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "fuse.glusterfs",
        "fuse.s3fs",
        "fuse.sshfs",
        "glusterfs",
        "gpfs",
    ),
    *("lustre", "ncpfs", "nfs", "nfs4", "orangefs", "panfs", "smb3", "smbfs", "virtiofs"),
}


def default_store_path() -> Path:
    """The store that every run of this user shares.

    Returns:
        `$TETHER_HOME/reference-log-probs.sqlite` if `TETHER_HOME` is set, else that file in the folder
        `tether` of the platform's cache folder (`$XDG_CACHE_HOME` or `~/.cache`, `~/Library/Caches`,
        `%LOCALAPPDATA%`).

    Raises:
        StoreError: If the user has no home folder.
    """
    home = os.environ.get("TETHER_HOME")
    try:
        folder = Path(home).expanduser() if home else _cache_folder() / "tether"
    except RuntimeError as error:
        raise StoreError(
            problem=f"Cannot tell where the log-prob store is: this user has no home folder ({error}).",
            instead="Set the environment variable TETHER_HOME to a folder, or name a file as `ref_store`.",
        ) from error
    return folder.absolute() / _FILE_NAME


def store_path(name: str | os.PathLike[str] | None) -> Path:
    """The absolute path of a store by its name; None is the one that is shared.

    Raises:
        StoreError: If the name is empty, or the user has no home folder.
    """
    if name is None:
        return default_store_path()
    if not os.fspath(name):
        raise StoreError(
            problem="Cannot open a log-prob store at an empty path.",
            instead=f"Name a file, or leave it out for the shared store, {default_store_path()}.",
        )
    return Path(name).expanduser().absolute()


def _cache_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"


def is_on_network(path: Path) -> bool:
    """Whether `path` lies on a file system shared by machines, where WAL's shared memory does not work.

    Only Linux can tell; elsewhere the answer is False.
    """
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    resolved = path.resolve()
    longest, kind = -1, ""
    for _, point, file_system, *_ in (line.split(" ") for line in mounts):
        mount = Path(point.replace(r"\040", " "))
        if len(mount.parts) >= longest and resolved.is_relative_to(mount):
            longest, kind = len(mount.parts), file_system
    return kind in _NETWORK_FILE_SYSTEMS
