"""Functions on a copied model that still mean the original: bound to the copy, or refused.

`copy.deepcopy` copies bound methods and takes functions as they are. A closure over a module, such as
`module.forward = torch.compile(module.forward)`, would let the copy compute with the original's weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dis import get_instructions
from functools import partial, update_wrapper
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from tether.errors import ReferenceModelError


def rebind(model: nn.Module, twin: nn.Module) -> None:
    """Lets every function on a copy's modules, hooks too, refer to the copy where it referred to the original.

    Args:
        model: The original.
        twin: Its copy, with the same tree of modules.

    Raises:
        ReferenceModelError: For a function that reaches the original by a global name or inside another object.
    """
    pairs: list[tuple[Any, Any]] = [*zip(model.modules(), twin.modules(), strict=True)]
    pairs += zip(model.parameters(), twin.parameters(), strict=True)
    rebind_to({id(original): copied for original, copied in pairs if original is not copied}, twin)


def rebind_to(copies: dict[int, Any], twin: nn.Module) -> None:
    """The same by the `id` of what was copied: modules, parameters."""
    for path, module in twin.named_modules():
        for name, value in list(vars(module).items()):
            is_hooks = isinstance(value, dict) and name.endswith("_hooks")
            binding = _Binding(copies, f"{path}.{name}".lstrip("."), only_looks=is_hooks)
            if is_hooks:
                value.update({key: binding.of(hook) for key, hook in value.items()})
            elif isinstance(value, FunctionType | MethodType | partial):
                vars(module)[name] = binding.of(value)


class _Binding:
    """Makes functions refer to copies.

    Args:
        copies: The copies by the `id` of what they were made of.
        name: Where the function was found, for messages.
        only_looks: It is a hook: one that holds an object with the model in it is mostly there to record something.
    """

    def __init__(self, copies: dict[int, Any], name: str, *, only_looks: bool) -> None:
        self._copies, self._name, self._only_looks = copies, name, only_looks
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """The same for the copy; the value itself where it has nothing to do with the original."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, MethodType):
            owner, function = self.of(value.__self__), self.of(value.__func__)
            same = owner is value.__self__ and function is value.__func__
            return value if same else MethodType(function, owner)
        if isinstance(value, partial):
            return self._partial(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if not self._only_looks:
            self._refuse_inside(value)
        return value

    def _partial(self, value: partial[Any]) -> Any:
        made = partial(
            self.of(value.func), *map(self.of, value.args), **{k: self.of(v) for k, v in value.keywords.items()}
        )
        vars(made).update(vars(value))
        return made

    def _function(self, function: Any) -> Any:
        if id(function) in self._made:
            return self._made[id(function)]
        self._refuse_globals(function)
        cells = function.__closure__ or ()
        own = tuple(CellType() for _ in cells)
        made: Any = FunctionType(function.__code__, function.__globals__, function.__name__, None, own)
        self._made[id(function)] = made  # before what it refers to, which may be itself
        differs = [self._fill(new, old) for new, old in zip(own, cells, strict=True)]
        defaults = [self.of(value) for value in function.__defaults__ or ()]
        named = {name: self.of(value) for name, value in (function.__kwdefaults__ or {}).items()}
        differs += [new is not old for new, old in zip(defaults, function.__defaults__ or (), strict=True)]
        differs += [value is not function.__kwdefaults__[name] for name, value in named.items()]
        if not any(differs):
            self._made[id(function)] = function
            return function
        update_wrapper(made, function)
        made.__defaults__, made.__kwdefaults__ = tuple(defaults) or None, named or None
        for name, value in vars(function).items():
            setattr(made, name, self.of(value) if isinstance(value, FunctionType | MethodType) else value)
        return made

    def _fill(self, new: CellType, old: CellType) -> bool:
        """Fills a cell for the copy, and says whether that differs from the original's."""
        try:
            contents = old.cell_contents
        except ValueError:  # empty
            return False
        new.cell_contents = self.of(contents)
        return new.cell_contents is not contents

    def _refuse_globals(self, function: Any) -> None:
        for name in _globals(function.__code__):
            if self._means_original(function.__globals__.get(name)):
                self._refuse(f"the global name `{name}`")

    def _refuse_inside(self, value: Any) -> None:
        for held in _held(value):
            if self._means_original(held):
                self._refuse(f"a {type(value).__name__}")

    def _means_original(self, value: Any) -> bool:
        return id(getattr(value, "__self__", value) if isinstance(value, MethodType) else value) in self._copies

    def _refuse(self, through: str) -> None:
        raise ReferenceModelError(
            problem=f"Cannot copy this model for the reference: the function in `{self._name}` reaches the model's own "
            f"modules through {through}, so the copy would compute with the weights that train.",
            instead="Write it as a method, `module.forward = types.MethodType(function, module)`, which finds its "
            "module in `self`.",
        )


def _globals(code: CodeType) -> Iterator[str]:
    """The global names that a function looks up, and those that functions in it do."""
    yield from (step.argval for step in get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)


def _held(value: Any) -> Iterable[Any]:
    """What an object holds, one level deep."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    is_opaque = isinstance(value, type | ModuleType | torch.Tensor | nn.Module)
    return () if is_opaque or not hasattr(value, "__dict__") else vars(value).values()
