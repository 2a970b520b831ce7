"""Attributes of objects that are not ours, replaced for a while.

accelerate puts a `forward` of its own on a module, DeepCache does the same, and a user may have
compiled `vae.decode`. So what lies on an object is kept and put back, whether it was the object's
own or its class's, and a wrapper calls what it found. Patches may be taken off in any order: one
that others lie over leaves them where they are, and they then stand on what was there before it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import nn

_ABSENT = object()  # the object has no attribute of that name, though its class may have one
_HOOKS = ("_hf_hook", "_old_forward", "_diffusers_hook")  # accelerate's and diffusers' own
_T = TypeVar("_T")


class _Patch:
    """One attribute that is replaced now.

    Attributes:
        owner: the object, or the one that a compiled module hands its attributes on to.
        name: of the attribute.
        put: what stands there because of this patch.
        before: what the object had of its own; `_ABSENT` for nothing.
    """

    def __init__(self, owner: Any, name: str, put: Any) -> None:
        if name not in vars(owner):
            owner = getattr(owner, "_orig_mod", owner)  # where `torch.compile` keeps the rest
        self.owner, self.name, self.put = owner, name, put
        self.before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, put)
        _live.append(self)

    def take_off(self) -> None:
        """Put back what was there, or hand it to the patch that lies over this one."""
        _live.remove(self)
        for above in _live:
            if above.owner is self.owner and above.name == self.name and above.before is self.put:
                above.before = self.before
                return
        if vars(self.owner).get(self.name, _ABSENT) is not self.put:
            return  # somebody else has put something there since, which stays
        if self.before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


_live: list[_Patch] = []  # those that are in place, in the order of their coming


@contextmanager
def replaced_attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object other attributes for a while.

    Args:
        owner: a pipeline, model, scheduler or any other object with a `__dict__`.
        values: by name of the attribute.
    """
    with ExitStack() as stack:
        for name, value in values.items():
            stack.callback(_Patch(owner, name, value).take_off)
        yield


@contextmanager
def wrapped_method(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Let a function stand around a method of one object for a while.

    Args:
        owner: the object.
        name: of its method.
        around: called as `around(method, *args, **kwargs)`, where `method` is as it was found, with
            everything that others had put over it. The signature stays that of `method`.
    """
    method, standing = getattr(owner, name), True

    @functools.wraps(method)  # pipelines look at the signatures of a scheduler's methods
    def relay(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs) if standing else method(*args, **kwargs)

    with replaced_attributes(owner, **{name: relay}):
        try:
            yield
        finally:
            standing = False  # what lies over this patch may go on calling it


@contextmanager
def kept_values(thing: Any) -> Iterator[None]:
    """Let an object change for a while: afterwards it holds the very values that it held before.

    Its methods are left alone, be they its own or its class's. A list or tensor that is changed in
    place is not copied.
    """
    before = {name: value for name, value in vars(thing).items() if not callable(value)}
    try:
        yield
    finally:
        held = [name for name, value in vars(thing).items() if not callable(value)]
        for name in held:
            if name not in before:
                delattr(thing, name)
        vars(thing).update(before)


def copied_without_patches(thing: _T, shared: Mapping[int, Any] | None = None) -> _T:
    """A deep copy of an object without the methods and hooks that others put on it or its modules.

    Those act on the object that they were made for: a copy that kept them would drive the original.
    Hooks that PyTorch itself registers are copied; a module that was compiled is copied as it was
    before.

    Args:
        thing: a model, a scheduler or another object.
        shared: what stands for an object in the copy, by its `id`; such as weights.
    """
    memo: dict[int, Any] = dict(shared or {})
    parts: list[Any] = list(thing.modules()) if isinstance(thing, nn.Module) else [thing]
    compiled = [part for part in parts if "_orig_mod" in getattr(part, "_modules", ())]
    laid = [
        (part, name)
        for part in parts
        if part not in compiled
        for name in vars(part)
        if is_patch(part, name)
    ]
    memo |= {id(vars(part)[name]): None for part, name in laid}
    for part in reversed(compiled):  # the innermost first
        memo[id(part)] = copy.deepcopy(part._orig_mod, memo)
    made = copy.deepcopy(thing, memo)
    for part, name in laid:
        delattr(memo[id(part)], name)
    return made


def is_patch(thing: Any, name: str) -> bool:
    """Whether an attribute of an object is a method that hides its class's, or a library's hook."""
    if name in _HOOKS:
        return True
    return callable(vars(thing).get(name)) and callable(getattr(type(thing), name, None))
