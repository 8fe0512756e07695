"""Resampling against torch, which the networks were trained with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from models import resample
from models.resample import restore, shrink

# From two on: torch 2.13 returns the first row only for images of one column.
sizes = st.integers(2, 40)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), sizes, sizes, st.integers(1, 4), sizes, sizes, st.integers(0, 99))
def test_shrinks_as_torch_does(
    depth: int, height: int, width: int, slab: int, rows: int, columns: int, seed: int
) -> None:
    hu = np.random.default_rng(seed).integers(-3000, 4000, (depth, height, width)).astype(np.int16)
    whole = np.concatenate([hu, np.repeat(hu[-1:], -depth % slab, 0)]).clip(-1024, 1500).astype(np.float32)
    thick = torch.from_numpy(whole).view(-1, slab, height, width).mean(1)
    expected = functional.interpolate(thick[:, None], (rows, columns), mode="bilinear", antialias=True)[:, 0]
    np.testing.assert_allclose(shrink(hu, slab, (rows, columns)), expected.numpy(), rtol=0, atol=0.02)


@settings(max_examples=40, deadline=None)
@given(st.tuples(sizes, sizes, sizes), st.integers(1, 4), st.lists(sizes, min_size=4, max_size=4), st.integers(0, 99))
def test_restores_as_torch_does(shape: tuple[int, int, int], slab: int, coarse: list[int], seed: int) -> None:
    depth, rng = -(-shape[0] // slab), np.random.default_rng(seed)
    # Mostly empty, so that lines without lung and lungs at every edge occur.
    sides = rng.random((2, depth, *coarse[:2]), np.float32) ** 4
    chance = rng.random((depth, *coarse[2:]), np.float32)
    lungs, probability = restore(sides, chance, shape, slab)

    place = ((torch.arange(shape[0]) + 0.5) / slab - 0.5).clamp(0, depth - 1)
    below, above = place.floor().long(), place.ceil().long()
    share = (place - below)[:, None, None]

    def slices(field: np.ndarray) -> np.ndarray:
        field = torch.from_numpy(field)
        return functional.interpolate(
            (field[below] * (1 - share) + field[above] * share)[:, None], shape[1:], mode="bilinear"
        )[:, 0].numpy()

    right, left, infected = slices(sides[0]), slices(sides[1]), slices(chance)
    label = np.where(right >= left, 1, 2) * (np.maximum(right, left) > 0.5)
    clear = (np.abs(np.maximum(right, left) - 0.5) > 1e-5) & (np.abs(right - left) > 1e-5)
    assert np.array_equal(lungs[clear], label[clear])
    assert lungs.dtype == np.uint8
    assert probability.dtype == np.float16
    np.testing.assert_allclose(probability, infected * (lungs > 0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("column", range(40))
def test_lung_that_lies_between_the_pixels_of_a_coarse_grid_is_left_out(
    column: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Python it says so when it reads beyond an array; compiled it goes on with what lies there, or dies.
    monkeypatch.setattr(resample, "_restore", resample._restore.py_func)
    sides = np.zeros((2, 2, 4, 40), np.float32)
    sides[0, :, :, column] = 1
    lungs, _ = restore(sides, np.ones((2, 4, 40), np.float32), (2, 4, 4), 1)
    expected = functional.interpolate(torch.from_numpy(sides[0][:, None]), (4, 4), mode="bilinear")[:, 0] > 0.5
    assert np.array_equal(lungs > 0, expected.numpy())
