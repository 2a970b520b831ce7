"""Patches of objects that are not ours come off as if they had never been there, in any order."""

from __future__ import annotations

import copy
import inspect
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from torch import nn

from convfusion.patches import copied_without_patches, replaced_attributes, wrapped_method


class Thing:
    kind = "a thing"

    def __init__(self) -> None:
        self.count = 0

    def add(self, amount: int) -> int:
        self.count += amount
        return self.count


def twice(found: Any, amount: int) -> int:
    return found(2 * amount)


@pytest.mark.parametrize("own", [False, True])
def test_what_was_there_is_put_back(own):
    thing = Thing()
    if own:
        thing.add = lambda amount: 100 + amount  # as accelerate, DeepCache and compilers do
    before = dict(vars(thing))
    with replaced_attributes(thing, kind="another", count=7):
        assert (thing.kind, thing.count) == ("another", 7)
    with wrapped_method(thing, "add", twice):
        assert thing.add(1) == (102 if own else 2), "a wrapper calls what it found"
        assert list(inspect.signature(thing.add).parameters) == ["amount"]
    assert vars(thing).get("add") is before.get("add")
    assert vars(thing).keys() == before.keys()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_puts_it_back_too(stop):
    thing = Thing()
    with suppress(stop), wrapped_method(thing, "add", twice), replaced_attributes(thing, kind="b"):
        raise stop
    assert vars(thing) == {"count": 0}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
def test_patches_come_off_in_any_order(order):
    thing = Thing()
    stacks = [ExitStack() for _ in order]
    for factor, stack in zip((2, 3, 5), stacks, strict=True):
        stack.enter_context(
            wrapped_method(
                thing, "add", lambda found, amount, factor=factor: found(amount * factor)
            )
        )
        stack.enter_context(replaced_attributes(thing, kind=factor))
    left = 30
    for index in order:
        thing.count = 0
        assert thing.add(1) == left
        stacks[index].close()
        left //= (2, 3, 5)[index]
    assert vars(thing) == {"count": 1 * thing.count}
    assert thing.kind == "a thing"


def test_what_others_put_over_it_stays():
    thing = Thing()
    with wrapped_method(thing, "add", twice), replaced_attributes(thing, kind="b"):
        under = thing.add
        thing.add = theirs = lambda amount: under(amount) + 100
        thing.kind = "theirs"
        assert thing.add(1) == 102
    assert thing.add is theirs and thing.kind == "theirs"
    assert thing.add(1) == 103, "what it wrapped does nothing any more"


def test_a_compiled_module_is_patched_where_it_keeps_its_attributes():
    class Coder(nn.Linear):
        def decode(self) -> str:
            return "picture"

    coder = Coder(2, 2)
    compiled, whole = torch.compile(coder, backend="eager"), set(vars(coder))
    with wrapped_method(compiled, "decode", lambda found: f"{found()}!"):
        assert compiled.decode() == coder.decode() == "picture!"
    assert set(vars(coder)) == whole
    assert "decode" not in vars(compiled)


def test_a_copy_does_not_drive_the_original():
    thing = Thing()
    with wrapped_method(thing, "add", twice):
        assert copy.copy(thing).add(1) == 2 and thing.count == 2, "which a plain copy does"
        made = copied_without_patches(thing)
        assert made.add(1) == 3 and thing.count == 2

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    forward = model[1].forward
    model[1].forward = lambda tokens: forward(tokens)
    model[0]._hf_hook = object()
    shared = {id(p): p for p in model.parameters()}
    made = copied_without_patches(model, shared)
    assert "forward" not in vars(made[1]) and not hasattr(made[0], "_hf_hook")
    assert made[1].weight is model[1].weight and "forward" in vars(model[1])
