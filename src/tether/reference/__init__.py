"""References: where `pi_ref` comes from. One contract, one file per kind."""

from tether.reference.base import Kind, Reference, Traits
from tether.reference.bema import BemaReference
from tether.reference.explicit import ExplicitReference, Placement
from tether.reference.free import FreeReference
from tether.reference.given import GivenReference
from tether.reference.identity import ReferenceIdentity
from tether.reference.implicit import ImplicitReference
from tether.reference.precomputed import PrecomputedReference
from tether.reference.synchronized import SynchronizedReference
from tether.reference.wrapping import WrappingReference

__all__ = [
    "BemaReference",
    "ExplicitReference",
    "FreeReference",
    "GivenReference",
    "ImplicitReference",
    "Kind",
    "Placement",
    "PrecomputedReference",
    "Reference",
    "ReferenceIdentity",
    "SynchronizedReference",
    "Traits",
    "WrappingReference",
]
