"""Rotary embeddings that look at the length, for tiny Llamas."""

from __future__ import annotations

from typing import Any

LIMIT = 24
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {
        "max_position_embeddings": LIMIT,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 8.0},
    },
    "longrope": {
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": LIMIT,
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [1.0, 4.0, 8.0, 16.0],
        },
    },
}
