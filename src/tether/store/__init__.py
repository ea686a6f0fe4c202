"""Reference log-probs on disk: scored once, found by what was computed, and never served if in doubt."""

from tether.store.exchange import export_parquet, import_parquet, merge, prune
from tether.store.key import KEY_BYTES, content_key, key_at_length
from tether.store.log_prob_store import LogProbStore, StoredIdentity, StoredPass, default_store_path
from tether.store.probe import KeptProbe
from tether.store.salvage import salvage

__all__ = [
    "KEY_BYTES",
    "KeptProbe",
    "LogProbStore",
    "StoredIdentity",
    "StoredPass",
    "content_key",
    "default_store_path",
    "export_parquet",
    "import_parquet",
    "key_at_length",
    "merge",
    "prune",
    "salvage",
]
