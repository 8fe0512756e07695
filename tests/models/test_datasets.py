"""Splits keep patients apart; the readers give canonical, HU-like slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.training.datasets import (
    PIXEL_MM,
    Patient,
    covid_seg_20,
    medseg_9,
    phantoms,
    right_and_left,
    semiseg,
    split,
)


def patient(name: str, source: str, part: str | None = None) -> Patient:
    empty = np.zeros((1, 2, 2), np.int16)
    return Patient(name, source, "own", empty, None, None, part)


@given(
    sizes=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 40), min_size=1),
    seed=st.integers(0, 1000),
)
def test_no_patient_is_on_two_sides(sizes: dict[str, int], seed: int) -> None:
    patients = [patient(f"{source}{n}", source) for source, count in sizes.items() for n in range(count)]
    parts = split(patients, seed)
    names = [p.id for part in (parts.train, parts.validation, parts.test) for p in part]
    assert sorted(names) == sorted(p.id for p in patients)
    assert split(reversed(patients), seed) == parts, "the order of reading must not matter"
    for source, count in sizes.items():
        tested = sum(p.source == source for p in parts.test)
        assert tested == -(-count // 5)


def test_published_parts_are_kept() -> None:
    patients = [patient(f"s{n}", "semiseg", "test" if n < 3 else "train") for n in range(9)]
    parts = split(patients, 4)
    assert {p.id for p in parts.test} == {"s0", "s1", "s2"}
    assert len(parts.train) == 6
    assert not parts.validation


def test_two_patients_of_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="share an id"):
        split([patient("one", "a"), replace(patient("one", "a"), licence="other")], 0)


def test_sides_of_lungs_that_touch() -> None:
    mask = np.zeros((60, 100), bool)
    mask[10:50, 10:45] = mask[10:50, 55:90] = True
    mask[28:31, 45:55] = True
    sides = right_and_left(mask, 50)
    assert (sides[mask] > 0).all()
    assert not sides[~mask].any()
    assert (sides[:, 10:45][mask[:, 10:45]] == 1).all()
    assert (sides[:, 55:90][mask[:, 55:90]] == 2).all()


def test_one_lung_alone_keeps_its_side() -> None:
    mask = np.zeros((60, 100), bool)
    mask[10:50, 60:90] = True
    assert set(np.unique(right_and_left(mask, 50))) == {0, 2}


def test_phantoms_as_patients() -> None:
    drawn = phantoms([0, 4], slices=8)
    assert drawn[0].infection is not None
    assert not drawn[0].infection.any()
    for one in drawn:
        assert one.lungs is not None
        assert one.hu.shape == one.lungs.shape
        columns = np.flatnonzero(one.lungs.any((0, 1)))
        assert 180 < (columns[-1] - columns[0]) * PIXEL_MM < 340


@pytest.mark.data
def test_real_sets_are_canonical_and_like_hu(data_dir: Path) -> None:
    slices = data_dir / "slices"
    if not slices.is_dir():
        pytest.skip(f"{slices} is missing")
    for one in [*covid_seg_20(slices)[:1], *medseg_9(slices)[:1]]:
        assert one.lungs is not None
        assert one.infection is not None
        x = np.broadcast_to(np.arange(one.hu.shape[2]), one.hu.shape)
        assert x[one.lungs == 1].mean() < x[one.lungs == 2].mean() - 60
        # The liver lies under the right lung: the base of the lungs is soft on that side.
        low = one.hu[: max(2, len(one.hu) // 20)]
        body = low > -300
        assert (body & (x[: len(low)] < 120)).sum() > 0
        aerated = one.hu[(one.lungs > 0) & ~one.infection]
        assert -900 < np.median(aerated) < -830
        assert np.median(one.hu[one.infection]) > -750


@pytest.mark.data
def test_the_published_split_of_semiseg(data_dir: Path) -> None:
    slices = data_dir / "slices"
    if not slices.is_dir():
        pytest.skip(f"{slices} is missing")
    patients = semiseg(slices)
    assert [sum(p.part == part for p in patients) for part in ("train", "test")] == [50, 48]
    assert all(p.infection is not None and p.lungs is None for p in patients)
