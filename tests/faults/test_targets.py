"""The calls that faults.py names are there: a renamed function would not be met, and its fault would prove nothing."""

import pkgutil

import pytest

from tests.faults import faults

NAMED = [
    fault
    for value in vars(faults).values()
    for fault in (value if isinstance(value, list) else [value])
    if isinstance(fault, faults.Fault)
]


@pytest.mark.parametrize("target", sorted({fault.target for fault in NAMED}))
def test_the_call_is_there(target: str) -> None:
    assert callable(pkgutil.resolve_name(target))
