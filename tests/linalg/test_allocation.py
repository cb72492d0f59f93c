"""Allocation over layers: the total is met, equal parts get equal shares, and no other sharing loses less."""

from __future__ import annotations

import itertools

import pytest

from streamlap.linalg.allocation import LEAST, MOST, POWER, Curve, Part, allocate, allocate_kinds, fit_curve

PARTS = [
    Part(parameters=count, curve=Curve(scale=scale))
    for count, scale in [(1000, 0.5), (4000, 0.1), (1000, 0.02), (4001, 0.9), (997, 0)]
]
TOTALS = (100, 3000, 5501, 8798, 10998)


def total_loss(parts: list[Part], counts: list[int]) -> float:
    return sum(part.curve.loss(count / part.parameters) for part, count in zip(parts, counts, strict=True))


@pytest.mark.parametrize("total", TOTALS)
def test_the_total_is_met_inside_the_bounds(total: int) -> None:
    counts = allocate(PARTS, total)
    assert sum(counts) == total
    uniform = total / sum(part.parameters for part in PARTS)
    for part, count in zip(PARTS, counts, strict=True):
        assert LEAST * uniform * part.parameters - 1 <= count <= min(1.0, MOST * uniform) * part.parameters + 1


def test_equal_parts_get_equal_shares() -> None:
    parts = [Part(parameters=1000, curve=Curve(scale=0.3))] * 5
    assert allocate(parts, 3500) == [700] * 5
    assert allocate(parts, 3503) == [701, 701, 701, 700, 700]


def test_parts_without_a_loss_give_to_the_others() -> None:
    parts = [Part(parameters=1000, curve=Curve(scale=scale)) for scale in (0.0, 1.0)]
    assert allocate(parts, 1000) == [round(500 * LEAST), 1000 - round(500 * LEAST)]


@pytest.mark.parametrize("total", [900, 1500, 2100, 2700])
@pytest.mark.parametrize("scales", [(0.2, 0.5, 1.1), (0.2, 0.2, 0.21), (0.001, 5.0, 0.0)])
@pytest.mark.parametrize("sizes", [(1000, 1000, 1000), (400, 2000, 600)])
def test_no_other_sharing_loses_less(
    total: int, scales: tuple[float, float, float], sizes: tuple[int, int, int]
) -> None:
    parts = [Part(parameters=size, curve=Curve(scale=scale)) for size, scale in zip(sizes, scales, strict=True)]
    uniform = total / 3000
    bounds = [(round(LEAST * uniform * size), round(min(1.0, MOST * uniform) * size)) for size in sizes]
    first, second = (range(low, high + 1, 5) for low, high in bounds[:2])
    rest = range(bounds[2][0], bounds[2][1] + 1)
    tried = [(a, b, total - a - b) for a, b in itertools.product(first, second) if total - a - b in rest]
    assert len(tried) > 100
    best = min(total_loss(parts, list(counts)) for counts in tried)
    assert total_loss(parts, allocate(parts, total)) <= best + 1e-9


def test_more_in_all_is_no_less_for_any() -> None:
    rows = [allocate(PARTS, total) for total in range(200, 10998, 200)]
    for before, after in itertools.pairwise(rows):
        assert all(more >= less - 1 for less, more in zip(before, after, strict=True))


def test_a_steeper_curve_gets_more() -> None:
    shares = []
    for scale in (0.1, 0.2, 0.4):
        parts = [Part(parameters=1000, curve=Curve(scale=s)) for s in (scale, 0.2)]
        shares.append(allocate(parts, 1600)[0])
    assert shares == sorted(set(shares))


def test_keep_at_is_where_the_slope_is() -> None:
    curve, step = Curve(scale=0.7), 1e-6
    for slope in (0.01, 0.2, 1.0):
        keep = curve.keep_at(slope)
        assert (curve.loss(keep - step) - curve.loss(keep + step)) / (2 * step) == pytest.approx(slope, rel=1e-5)
    assert curve.keep_at(0.0) == 1.0
    assert Curve(scale=0.0).keep_at(1e-300) > 0.999
    assert 0 < Curve(scale=1e3).keep_at(1e90) < 1e-30


def test_what_is_cut_falls_by_powers_of_the_loss() -> None:
    """Away from the bounds, of parts of one size: what goes over what stays, where little goes and where most does."""
    for keep, power in ((0.9999, POWER - 1), (0.0001, POWER + 1)):
        price = Curve(scale=1.0)
        step = keep * 1e-6 * (1 - keep)
        slope = (price.loss(keep - step) - price.loss(keep + step)) / (2 * step)
        odds = [1 / Curve(scale=scale).keep_at(slope) - 1 for scale in (1.0, 1.5, 2.0)]
        for one, scale in zip(odds, (1.0, 1.5, 2.0), strict=True):
            assert one / odds[0] == pytest.approx(scale ** (-1 / power), rel=1e-2)


def test_a_curve_goes_through_its_point() -> None:
    assert fit_curve([(0.8, 0.01)]).loss(0.8) == pytest.approx(0.01)
    assert fit_curve([(0.8, 0.01)]).loss(1.0) == 0.0


def test_a_curve_goes_between_points() -> None:
    points = [(0.8, 0.02), (0.6, 0.03)]
    scales = [fit_curve([point]).scale for point in points]
    assert fit_curve(points).scale == pytest.approx((scales[0] * scales[1]) ** 0.5)


def test_a_loss_of_nothing_is_a_curve_too() -> None:
    assert fit_curve([(0.6, 0.0)]).loss(0.5) < 1e-10


def kinds_of(cheap: float) -> dict[str, list[Part]]:
    """Attention that costs little, and FFNs that cost ten times as much."""
    return {
        "attention": [Part(parameters=1000, curve=Curve(scale=cheap * scale)) for scale in (1.0, 1.5, 0.7)],
        "ffn": [Part(parameters=2000, curve=Curve(scale=scale)) for scale in (1.0, 0.8, 2.0)],
    }


def test_a_kind_keeps_its_floor_and_its_parts_still_differ() -> None:
    kinds, total = kinds_of(0.01), 4500
    assert sum(allocate([part for parts in kinds.values() for part in parts], total)[:3]) < 1500
    shares = allocate_kinds(kinds, total, {"attention": 0.5, "ffn": 0.5})
    assert {name: sum(counts) for name, counts in shares.items()} == {"attention": 1500, "ffn": 3000}
    assert shares["attention"] == allocate(kinds["attention"], 1500)
    assert len(set(shares["attention"])) == len(set(shares["ffn"])) == 3


def test_shares_of_a_kind_at_its_floor_are_bounded_by_multiples_of_that() -> None:
    """They may be lower than those of the uniform share allow."""
    total = 6500
    kinds = {
        "attention": [Part(parameters=1000, curve=Curve(scale=1e-6 * scale)) for scale in (1.0, 1e-2, 1e-4)],
        "ffn": [Part(parameters=2000, curve=Curve(scale=scale)) for scale in (1.0, 0.1, 1e-4)],
    }
    counts = allocate_kinds(kinds, total, {"attention": 0.6, "ffn": 0.7})
    assert sum(counts["attention"]) == 1800
    for name, uniform in (("attention", 0.6), ("ffn", (total - 1800) / 6000)):
        low, high = LEAST * uniform, min(1.0, MOST * uniform)
        shares = [count / part.parameters for count, part in zip(counts[name], kinds[name], strict=True)]
        assert all(low - 1e-3 <= share <= high + 1e-3 for share in shares)
        assert min(shares) == pytest.approx(low, abs=1e-3)
    assert min(counts["attention"]) / 1000 < LEAST * total / 9000


def test_a_floor_that_is_not_reached_changes_nothing() -> None:
    kinds = kinds_of(0.1)
    parts = [part for own in kinds.values() for part in own]
    for total in (3000, 6000, 8999):
        shares = allocate_kinds(kinds, total, {"attention": 0.0, "ffn": 0.0})
        assert [*shares["attention"], *shares["ffn"]] == allocate(parts, total)


@pytest.mark.parametrize("total", [901, 4499, 7201, 9000])
@pytest.mark.parametrize("cheap", [1e-6, 0.1, 1.0, 1e6])
def test_the_total_of_all_kinds_is_met(total: int, cheap: float) -> None:
    kinds, keep = kinds_of(cheap), total / 9000
    floors = {"attention": min(keep, 0.6), "ffn": min(keep, 0.8)}
    shares = allocate_kinds(kinds, total, floors)
    assert sum(map(sum, shares.values())) == total
    for name, parts in kinds.items():
        assert sum(shares[name]) >= int(floors[name] * sum(part.parameters for part in parts))
        assert all(count <= part.parameters for count, part in zip(shares[name], parts, strict=True))
