"""A process's access to a store file: opened at first use, one user at a time, closed before every fork.

Knows processes and transactions; must not know what is in the tables.
"""

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tether.errors import StoreError
from tether.store import schema
from tether.store.opening import open_to_read, open_to_write
from tether.store.sqlite_errors import as_store_error


class StoreFile:
    """The SQLite file of a store.

    Args:
        path: The file, absolute.
        read_only: Whether writing is refused.
    """

    def __init__(self, path: Path, read_only: bool) -> None:
        self.path = path
        self.read_only = read_only
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._closed = False

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with; all statements see one state of the store."""
        with _in_use, as_store_error("read the log-prob store", self.path):
            yield self._connection()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A connection within one transaction: everything in the block is written, or nothing."""
        if self.read_only:
            raise StoreError(
                problem=f"Cannot write to the log-prob store {self.path}: it was opened with `read_only=True`.",
                instead="Open it without `read_only`.",
            )
        with _in_use, as_store_error("write to the log-prob store", self.path):
            db = self._connection()
            try:
                db.execute("BEGIN IMMEDIATE")  # waits here for other writers, never halfway
                schema.check(db, self.path)  # within the transaction, so that nothing can come in between
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def settle(self) -> None:
        """Moves what was written from the write-ahead log into the file itself, as far as others allow it now.

        Then the log is emptied: one that is cut or damaged later would bring back what its beginning has.
        """
        with self.read() as db:
            (patience,) = db.execute("PRAGMA busy_timeout").fetchone()
            db.execute("PRAGMA busy_timeout = 0")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.execute(f"PRAGMA busy_timeout = {patience}")

    def close(self) -> None:
        """Closes the file permanently."""
        with _in_use:
            self._closed = True
            self.disconnect()

    def disconnect(self) -> None:
        """Closes the file until the next use."""
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _connection(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreError(
                problem=f"Cannot use the log-prob store {self.path}: it was closed.",
                instead="Open it again with `LogProbStore(path)`.",
            )
        if self._db is not None and not self._is_in_place():
            self.disconnect()  # the file was removed or replaced: rows written to the old one would be lost
        if self._db is None:
            self._db = open_to_read(self.path) if self.read_only else open_to_write(self.path)
            self._inode = self.path.stat().st_ino
            _open_files.add(self)
        return self._db

    def _is_in_place(self) -> bool:
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False


# A connection carried across a fork shares file locks with its parent, and closing either can cut off the other's
# writes; a lock held by another thread would never be released in the child. So a fork waits until no store is in
# use, and closes all files; both sides reopen them when needed.
_in_use = threading.RLock()
_open_files: "weakref.WeakSet[StoreFile]" = weakref.WeakSet()


def _before_fork() -> None:
    _in_use.acquire()
    for file in list(_open_files):
        file.disconnect()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_use.release, after_in_child=_in_use.release)
