"""Slices in space: any stack, however it lies and in whatever order, is even until a slice is taken out."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_instances import AXIAL, header

from node.images.geometry import VolumeError, regular_grid, require_same_planes
from node.intake.header import InstanceHeader
from node.intake.stack import Vector, acquisitions, normal, numbers_missing, tile


@st.composite
def stacks(draw: st.DrawFn) -> list[InstanceHeader]:
    """4 to 40 slices, evenly along the normal of any orientation, positions rounded as decimal strings are."""
    count, step = draw(st.integers(4, 40)), draw(st.floats(0.5, 10))
    quaternion = np.array(
        draw(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: math.hypot(*q) > 0.1))
    )
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    row = np.array([1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)])
    column = np.array([2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w)])
    origin = np.array(draw(st.lists(st.floats(-500, 500), min_size=3, max_size=3)))
    turn = tuple(np.concatenate([row, column]).round(6))
    places = [tuple((origin + n * step * np.cross(row, column)).round(4)) for n in range(count)]
    numbers = draw(st.permutations(range(count)))
    return [
        replace(header(n), orientation=turn, positions=(places[n],), instance_number=number)  # type: ignore[arg-type]
        for n, number in zip(draw(st.permutations(range(count))), numbers, strict=True)
    ]


@given(stacks())
def test_an_even_stack_is_even_in_any_orientation_and_order(stack: list[InstanceHeader]) -> None:
    tiling = tile(stack)
    assert tiling.kind == "even"
    assert tiling.layers == 1
    assert tiling.extent_mm == pytest.approx(tiling.step * len(stack), rel=1e-2)


@given(stacks(), st.data())
def test_one_slice_less_is_a_gap_where_it_was(stack: list[InstanceHeader], data: st.DataObject) -> None:
    direction = cast(Vector, normal(stack[0]))
    inner = sorted(stack, key=lambda h: float(np.dot(direction, h.positions[0])))[1:-1]
    missing = data.draw(st.sampled_from(inner))
    tiling = tile([one for one in stack if one is not missing])
    assert tiling.kind == "gap"
    at = float(tiling.detail.removeprefix("gap at z = ").split()[0])
    assert at == pytest.approx(float(np.dot(direction, missing.positions[0])), abs=0.1 + 0.01 * tiling.step)


@given(stacks())
def test_flipping_the_slices_over_changes_nothing(stack: list[InstanceHeader]) -> None:
    over = [replace(one, orientation=(*one.orientation[3:], *one.orientation[:3])) for one in stack if one.orientation]
    assert tile(over) == tile(stack)


def test_two_acquisitions_one_upon_the_other_do_not_hide_each_others_gaps() -> None:
    both = [header(n, acquisition_number=a, sop_instance_uid=f"1.{a}.{n}") for a in (1, 2) for n in range(10)]
    assert (tile(both).kind, tile(both).layers) == ("even", 2)
    assert tile(both[:4] + both[5:]).detail.startswith("gap at z = 4.0 mm")


@st.composite
def several(draw: st.DrawFn) -> tuple[list[InstanceHeader], list[list[list[str]]]]:
    """Acquisitions of the same part of a body, each reconstructed with several kernels, in any order of arrival.

    With the UIDs of each reconstruction of each acquisition.
    """
    told_by = draw(st.sampled_from(["acquisition_number", "temporal_position", "acquired_at"]))
    headers, expected = [], list[list[list[str]]]()
    for a in range(draw(st.integers(2, 4))):
        offset = 0.0 if told_by == "acquired_at" else draw(st.floats(0, 5))
        count, kernels = draw(st.integers(20, 40)), draw(st.integers(1, 3))
        acquisition = [
            [
                header(
                    n,
                    z=round(offset + 2 * n, 3),
                    sop_instance_uid=f"1.{a}.{kernel}.{n}",
                    kernel=f"K{kernel}",
                    **{told_by: a + 1 if told_by != "acquired_at" else 100.0 * a + 0.1 * n},
                )
                for n in range(count)
            ]
            for kernel in range(kernels)
        ]
        headers += [one for stack in acquisition for one in stack]
        expected.append([[one.sop_instance_uid for one in stack] for stack in acquisition])
    return draw(st.permutations(headers)), expected


@given(several())
def test_acquisitions_and_their_reconstructions_are_told_apart(
    made: tuple[list[InstanceHeader], list[list[list[str]]]],
) -> None:
    headers, expected = made
    found = [
        sorted(sorted(headers[n].sop_instance_uid for n in numbers) for _, numbers in one.reconstructions)
        for one in acquisitions(headers)
    ]
    assert found == [sorted(sorted(uids) for uids in one) for one in expected]
    assert (tile(headers).kind, tile(headers).layers >= 2) == ("even", True)


@given(stacks(), st.data())
def test_acquisitions_that_lie_end_to_end_are_one(stack: list[InstanceHeader], data: st.DataObject) -> None:
    direction = cast(Vector, normal(stack[0]))
    ordered = sorted(stack, key=lambda h: float(np.dot(direction, h.positions[0])))
    cuts = data.draw(st.sets(st.integers(0, len(stack))))
    numbers = data.draw(st.permutations(range(len(cuts) + 1)))
    told = [replace(one, acquisition_number=numbers[sum(cut <= n for cut in cuts)]) for n, one in enumerate(ordered)]
    (one,) = acquisitions(told)
    assert (one.name, one.reconstructions) == ("", (("", tuple(range(len(stack)))),))
    assert tile(told) == tile(stack)


@st.composite
def strays(draw: st.DrawFn, stack: list[InstanceHeader]) -> tuple[list[InstanceHeader], list[InstanceHeader]]:
    """A stack, in order, and one or two slices that lie between its first two, and are told from it by one value."""
    direction = cast(Vector, normal(stack[0]))
    ordered = sorted(stack, key=lambda h: float(np.dot(direction, h.positions[0])))
    told_by = draw(st.sampled_from(["acquisition_number", "temporal_position", "acquired_at", "slice_thickness"]))
    first, second = (np.array(one.positions[0]) for one in ordered[:2])
    few = [
        replace(
            ordered[0],
            sop_instance_uid=f"1.9.{n}",
            positions=(tuple(first + draw(st.floats(0.1, 0.9)) * (second - first)),),
            **{told_by: 10.0},
        )
        for n in range(draw(st.integers(1, 2)))
    ]
    return [
        replace(one, **{told_by: 20.0 + 0.1 * n * (told_by == "acquired_at")}) for n, one in enumerate(ordered)
    ], few


@given(stacks().flatmap(strays), st.data())
def test_a_slice_or_two_of_another_acquisition_make_no_gap_and_hide_none(
    made: tuple[list[InstanceHeader], list[InstanceHeader]], data: st.DataObject
) -> None:
    stack, few = made
    headers = data.draw(st.permutations(stack + few))
    assert tile(headers) == replace(tile(stack), strays=len(few))
    (one,) = acquisitions(headers)
    ((_, numbers),) = one.reconstructions
    assert (one.name, {headers[n].sop_instance_uid for n in numbers}) == ("", {h.sop_instance_uid for h in stack})
    missing = data.draw(st.integers(2, len(stack) - 2))
    assert tile(few + stack[:missing] + stack[missing + 1 :]).kind == "gap"


@given(several(), st.integers(1, 2))
def test_a_slice_or_two_beside_several_acquisitions_change_none_of_them(
    made: tuple[list[InstanceHeader], list[list[list[str]]]], count: int
) -> None:
    headers, _ = made
    assume(headers[0].acquisition_number is not None)
    few = [header(n, z=9.3 + n, sop_instance_uid=f"1.9.{n}", acquisition_number=99, kernel="K9") for n in range(count)]
    assert acquisitions(headers + few) == acquisitions(headers)
    assert tile(headers + few) == replace(tile(headers), strays=count)


def test_a_few_slices_that_fill_a_hole_or_lie_beyond_are_no_strays() -> None:
    other = [replace(one, acquisition_number=2) for one in map(header, range(10))]
    within = [*other[:4], header(4, acquisition_number=1), header(5, acquisition_number=1), *other[6:]]
    assert (tile(within).kind, tile(within).strays) == ("even", 0)
    beyond = [*other, header(12, acquisition_number=1)]
    assert (tile(beyond).kind, tile(beyond).strays) == ("gap", 0)
    alternate = [header(n, acquisition_number=n if n % 2 else 0) for n in range(10)]
    assert (tile(alternate).kind, tile(alternate).strays) == ("even", 0)


def test_acquisitions_have_names_of_their_own_whatever_their_numbers() -> None:
    numbers = (20260101, 20260102, None)
    made = [header(n, acquisition_number=a, sop_instance_uid=f"1.{a}.{n}") for a in numbers for n in range(10)]
    assert [one.name for one in acquisitions(made[:20])] == ["acquisition 20260101", "acquisition 20260102"]
    assert [one.name for one in acquisitions(made)] == [f"acquisition {n} of 3" for n in (1, 2, 3)]


def test_a_phase_less_at_one_place_is_a_gap() -> None:
    phases = [header(n, sop_instance_uid=f"1.{a}.{n}") for a in (1, 2, 3) for n in range(10)]
    assert tile(phases).kind == "even"
    assert tile(phases[:-4] + phases[-3:]).detail == "gap at z = 6.0 mm (fewer slices there than elsewhere)"


def test_several_missing_slices_do_not_become_the_measure() -> None:
    alternate = [header(n, z=z) for n, z in enumerate((0, 1, 3, 4, 6, 7, 9, 10))]
    assert tile(alternate).detail == "gap at z = 2.0, 5.0, 8.0 mm (2.0 mm between slices, 1.0 mm elsewhere)"


def test_extra_slices_make_a_stack_uneven() -> None:
    extra = [header(n, z=z) for n, z in enumerate((0, 1, 3, 5, 7))]
    assert (tile(extra).kind, tile(extra).detail) == ("gap", "uneven spacing: 1.0 to 2.0 mm between slices")


def test_a_gap_in_the_stack_shows_beside_a_localizer() -> None:
    localizer = header(99, orientation=(0, 1, 0, 0, 0, -1), positions=((0.0, -300.0, 100.0),))
    assert tile([localizer, *map(header, range(8))]).kind == "even"
    assert tile([localizer, *map(header, (0, 1, 2, 4, 5))]).kind == "gap"


@pytest.mark.parametrize(
    ("series", "why"),
    [
        ([header(0)], "1 placed slices are too few to compare"),
        ([header(0, positions=()), header(1, positions=())], "no slice positions"),
        ([header(n, orientation=None) for n in range(5)], "no slice positions"),
        ([header(n, orientation=(1, 0, 0, 1, 0, 0)) for n in range(5)], "no slice positions"),
        ([header(n, z=7) for n in range(5)], "all 5 slices are at one place"),
    ],
)
def test_where_geometry_does_not_tell(series: list[InstanceHeader], why: str) -> None:
    assert (tile(series).kind, tile(series).detail) == ("unknown", why)


def test_frames_of_an_enhanced_image_are_slices() -> None:
    frames = tuple((0.0, 0.0, 2.0 * n) for n in range(30))
    assert tile([header(0, positions=frames, number_of_frames=30)]).detail.endswith("to z=58.0 every 2.0 mm")
    assert tile([header(0, positions=frames[:9] + frames[10:], number_of_frames=29)]).kind == "gap"
    assert normal(header(0)) == normal(header(0, orientation=(-1, 0, 0, 0, 1, 0))) == (0, 0, 1)
    assert header(0).orientation == AXIAL


def test_the_senders_numbering_tells_that_more_is_to_come() -> None:
    assert numbers_missing([header(n) for n in range(5)]) == ""
    assert numbers_missing([header(n) for n in (4, 1, 2)]) == "1 instance numbers between 2 and 5 are missing"
    assert numbers_missing([header(n, instance_number=None) for n in range(3)]) == ""
    counted = [header(n, images_in_acquisition=9, acquisition_number=1) for n in range(5)]
    assert numbers_missing(counted) == "the sender counts 9 images in the acquisition"


@pytest.mark.parametrize("apart", [False, True])
def test_the_time_for_a_judgement_grows_with_the_number_of_slices_and_not_with_its_square(apart: bool) -> None:
    def seconds(count: int) -> float:
        # Each four slices have a kernel of their own, and lie next to the others; some lie upon them.
        many = [header(n, kernel=str(n // 4) if apart else "") for n in range(count)]
        upon = [header(count + n, z=n * count / 200, kernel="upon") for n in range(200)] if apart else []
        start = time.process_time()
        tile([*many, *upon])
        return time.process_time() - start

    assert seconds(12_000) < 12 * max(seconds(3000), 0.05)


def test_slices_of_ever_other_directions_are_not_compared_with_each_other() -> None:
    """Each would be compared with every direction before it, under the lock that intake waits for."""
    directions = [
        (math.cos(a), math.sin(a), 0.0, 0.0, math.sin(b), math.cos(b))
        for a in np.linspace(0, 3, 100)
        for b in np.linspace(0.1, 3, 100)
    ]
    headers = [replace(header(n), orientation=one) for n, one in enumerate(directions)]
    begun = time.process_time()
    assert tile(headers).kind == "unknown"
    assert acquisitions(headers) == []
    assert time.process_time() - begun < 0.5


@st.composite
def laid_out(draw: st.DrawFn) -> list[InstanceHeader]:
    """3 to 30 slices in any orientation, some of them missing, repeated, off their place, turned, or all sheared."""
    count, step = draw(st.integers(3, 30)), draw(st.sampled_from([0.3, 0.625, 0.7, 1.0, 2.5, 5.0]))
    a, b = draw(st.floats(-3, 3)), draw(st.floats(-1.5, 1.5))
    row = np.array([math.cos(a), math.sin(a), 0.0])
    column = np.array([-math.sin(a) * math.cos(b), math.cos(a) * math.cos(b), math.sin(b)])
    normal_ = np.cross(row, column)
    shear = draw(st.sampled_from([0.0, 0.0, 0.0, 0.004, 0.05, 0.3])) * step
    places = [n * (step * normal_ + shear * column) for n in range(count)]
    for _ in range(draw(st.integers(0, 2))):
        n = draw(st.integers(0, len(places) - 1))
        # Never just on a limit, where the last bit decides.
        off = draw(st.sampled_from([0.0003, 0.03, 0.11, 0.19, 0.21, 0.4, 0.9, 2.1, step, -step]))
        match draw(st.sampled_from(["missing", "repeated", "along", "sideways"])):
            case "missing" if len(places) > 3:
                del places[n]
            case "repeated":
                places.append(places[n] + 0.01 * normal_)
            case "along":
                places[n] = places[n] + off * normal_
            case _:
                places[n] = places[n] + off * row
    orientation = tuple(np.concatenate([row, column]).tolist())
    turned = tuple(np.concatenate([row, column + 0.003 * normal_]).tolist())
    odd = draw(st.sampled_from([None, None, None, 0, 1]))
    wide = draw(st.sampled_from([None, None, None, 0, 1]))
    decimals = draw(st.sampled_from([1, 3, 6]))
    return [
        replace(
            header(n),
            orientation=turned if n == odd else orientation,
            positions=(tuple(np.round(place, decimals).tolist()),),
            pixel_spacing=(0.71, 0.71) if n == wide else (0.7, 0.7),
        )
        for n, place in draw(st.permutations(list(enumerate(places))))
    ]


@settings(max_examples=300)
@given(laid_out())
def test_what_intake_takes_for_one_even_stack_is_what_the_volume_is_laid_out_from(stack: list[InstanceHeader]) -> None:
    """And the reverse: nothing is accepted here and refused there, or refused here and readable there."""
    orientations = [one.orientation for one in stack if one.orientation]
    pixels = [one.pixel_spacing for one in stack if one.pixel_spacing]
    try:
        require_same_planes(orientations, pixels)
        regular_grid([one.positions[0] for one in stack], orientations[0], pixels[0], None)
        readable = ""
    except VolumeError as error:
        readable = str(error)
    tiling = tile(stack)
    accepted = tiling.kind == "even" and tiling.layers == 1 and not tiling.strays
    assert accepted == (not readable), (tiling, readable)


def test_a_slice_off_its_place_is_no_gap_and_no_even_stack() -> None:
    off = tile([header(n, z=2.5 * n + 0.4 * (n == 5)) for n in range(12)])
    assert off.kind == "uneven"
    assert off.whole
    assert off.detail.endswith("the slice at z = 12.90 mm is 0.40 mm off a regular grid")
    leaning = tile([header(n, positions=((0.0, 0.2 * n, float(n)),)) for n in range(12)])
    assert (leaning.kind, leaning.detail[:16]) == ("uneven", "gantry tilt of 1")
    far = tile([header(n, positions=((1e200, 0.0, float(n)),)) for n in range(12)])
    assert (far.kind, far.detail) == ("uneven", "a slice position is too far from the origin to be one")
