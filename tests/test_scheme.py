import pytest

from qfarm.errors import InvalidInput
from qfarm.scheme import Scheme, parse_scheme


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("w4", "w4"),
        (4, "w4"),
        ("w4a16", "w4"),
        ("W8A8", "w8a8"),
        ("w4kv4a4", "w4a4kv4"),
        ("kv2", "kv2"),
        ("w4/8a8", "w4/8a8"),
        ("4/8", "w4/8"),
        ("w8/8", "w8"),
        ("w4q8p8", "w4q8p8"),
        ("w16", "w16"),
        ("w16/8", "w16/8"),
    ],
)
def test_canonical_names(text: str | int, name: str) -> None:
    assert str(parse_scheme(text)) == name
    assert parse_scheme(name) == parse_scheme(text)


@pytest.mark.parametrize("text", ["", "x4", "w", "w4w4", "w0", "w17", "a8/4", "w4 a8", "w4-a8", "w4/0"])
def test_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="scheme"):
        parse_scheme(text)


def test_sites_and_roles() -> None:
    scheme = parse_scheme("w4/8a8")
    assert scheme.sites == {"weight", "linear_in"}
    assert [scheme.weight_bits(role) for role in ("q", "o", "up", "down")] == [8, 8, 4, 4]
    assert scheme.weight_widths == (4, 8)
    assert Scheme().sites == frozenset()
    assert parse_scheme("w16/8").weight_widths == (8,)
