"""Standing in front of a method touches one object only, composes with others, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

from hf_gradguard.integrations.standin import StandIn


class Greeter:
    def greet(self, name: str) -> str:
        return f"hello {name}"


def shout(original: Any, name: str) -> str:
    return str(original(name)).upper()


def test_only_this_object_is_changed_and_only_until_removal() -> None:
    one, other = Greeter(), Greeter()
    stand_in = StandIn(one, "greet", shout)
    assert (one.greet("a"), other.greet("a")) == ("HELLO A", "hello a")
    stand_in.remove()
    stand_in.remove()
    assert one.greet("a") == "hello a"
    assert vars(one) == {}


def test_a_wrapper_put_on_the_object_before_is_called_and_put_back() -> None:
    greeter = Greeter()
    before = lambda name: f"dear {name}"  # noqa: E731
    greeter.greet = before  # type: ignore[method-assign]
    stand_in = StandIn(greeter, "greet", shout)
    assert greeter.greet("a") == "DEAR A"
    assert not stand_in.stands_before(Greeter)
    stand_in.remove()
    assert greeter.greet is before


def test_a_wrapper_put_on_the_class_later_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    greeter = Greeter()
    stand_in = StandIn(greeter, "greet", shout)
    assert stand_in.stands_before(Greeter)
    monkeypatch.setattr(Greeter, "greet", eval("lambda self, name: f'good day {name}'"))  # code of another file
    assert greeter.greet("a") == "GOOD DAY A"
    assert not stand_in.stands_before(Greeter)


def test_a_wrapper_put_around_us_survives_our_removal_and_we_pass_through() -> None:
    greeter = Greeter()
    stand_in = StandIn(greeter, "greet", shout)
    inner = greeter.greet
    greeter.greet = lambda name: f"<{inner(name)}>"  # type: ignore[method-assign]
    assert greeter.greet("a") == "<HELLO A>"
    stand_in.remove()
    assert greeter.greet("a") == "<hello a>"


def test_two_of_ours_can_be_removed_in_either_order() -> None:
    for order in ((0, 1), (1, 0)):
        greeter = Greeter()
        stand_ins = [StandIn(greeter, "greet", shout), StandIn(greeter, "greet", lambda original, name: original(name))]
        for index in order:
            stand_ins[index].remove()
        assert greeter.greet("a") == "hello a"
