"""References: where `pi_ref` comes from. One contract, one file per kind."""

from tether.reference.adapter import AdapterReference
from tether.reference.base import Reference
from tether.reference.build import ReferenceOptions, build_reference, check_options, waits_for_device
from tether.reference.following import FollowingReference
from tether.reference.frozen import FrozenReference
from tether.reference.given import GivenReference
from tether.reference.identity import ReferenceIdentity
from tether.reference.moving import MovingReference
from tether.reference.stored import StoredReference
from tether.reference.uniform import UniformReference

__all__ = [
    "AdapterReference",
    "FollowingReference",
    "FrozenReference",
    "GivenReference",
    "MovingReference",
    "Reference",
    "ReferenceIdentity",
    "ReferenceOptions",
    "StoredReference",
    "UniformReference",
    "build_reference",
    "check_options",
    "waits_for_device",
]
