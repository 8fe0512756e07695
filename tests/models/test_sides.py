"""Right and left by anatomy, whatever the images say of how the patient lies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from models.phantom.draw import Phantom, phantom
from models.sides import LEFT, RIGHT, Pose, absent, pose_of, settled

Turn = Callable[[np.ndarray], np.ndarray]

TURNS: dict[str, tuple[Turn, bool]] = {
    "as it is": (lambda a: a, False),
    "prone called supine": (lambda a: a[:, ::-1, ::-1], True),
    "feet first called head first": (lambda a: a[::-1, :, ::-1], True),
    "both": (lambda a: a[::-1, ::-1], False),
}


@pytest.fixture(scope="module", params=range(4110, 4114))
def drawn(request: pytest.FixtureRequest) -> Phantom:
    return phantom(request.param, shape=(48, 112, 112), severity=request.param % 4)


def by_place(lungs: np.ndarray, turned: bool) -> np.ndarray:
    """What a network calls the lungs, which goes by their place in the image."""
    return np.array([0, LEFT, RIGHT], np.uint8)[lungs] if turned else lungs


@pytest.mark.parametrize("how", TURNS)
def test_a_turned_patient_is_seen(drawn: Phantom, how: str) -> None:
    turn, turned = TURNS[how]
    pose = pose_of(by_place(turn(drawn.lungs), turned), turn(drawn.hu).astype(np.float32), drawn.spacing)
    assert pose.turned == turned
    assert bool(pose.notes) == turned
    # In the plane it then looks as usual, whichever way the slices go.
    stands = [np.flip(turn(drawn.hu), pose.flips), np.flip(turn(drawn.hu), (0, *pose.flips))]
    assert any(np.array_equal(one, drawn.hu) for one in stands)


def test_a_mirrored_patient_is_not_turned_but_named(drawn: Phantom) -> None:
    lungs = by_place(drawn.lungs[:, :, ::-1], True)
    pose = pose_of(lungs, drawn.hu[:, :, ::-1].astype(np.float32), drawn.spacing)
    assert not pose.turned
    assert not pose.contrary
    assert pose.heart_mm < 0


def test_what_is_not_clear_stays_as_the_images_say() -> None:
    assert not Pose(0, 0, -30.0).turned
    assert Pose(0, 0, -30.0).notes, "the heart is on the right"
    assert not Pose(-1, 0, 1.0).turned, "the heart has to agree where the apices are not seen"
    assert Pose(-1, 0, 1.0).notes
    assert Pose(-1, 0, -10.0).turned
    assert Pose(-1, 1, 5.0).turned
    assert not Pose(-1, 1, 25.0).turned
    assert not Pose(-1, -1, 10.0).turned
    assert not Pose(1, 1, 10.0).notes


def test_one_lung_does_not_say_how_the_patient_lies(drawn: Phantom) -> None:
    alone = np.where(drawn.lungs == RIGHT, drawn.lungs, 0)
    assert pose_of(alone, drawn.hu.astype(np.float32), drawn.spacing) == Pose(0, 0, 0.0)


def boxes(right: slice, left: slice) -> np.ndarray:
    label = np.zeros((6, 40, 100), np.uint8)
    label[1:5, 10:30, right], label[1:5, 10:30, left] = RIGHT, LEFT
    return label


def test_each_lung_lies_on_its_side_of_the_body() -> None:
    body = np.zeros((6, 40, 100), bool)
    body[:, 5:35, 10:90] = True
    true = boxes(slice(15, 45), slice(55, 85))
    assert np.array_equal(settled(true, body), true)
    assert np.array_equal(settled(boxes(slice(55, 85), slice(15, 45)), body), true)
    one = np.where(true == LEFT, true, 0)
    assert np.array_equal(settled(np.where(one > 0, np.uint8(RIGHT), np.uint8(0)), body), one)
    # A lung that has grown across the midline is still the one it was.
    across = boxes(slice(15, 70), slice(75, 85))
    assert np.array_equal(settled(across, body), across)
    assert not settled(np.zeros_like(true), body).any()


@pytest.mark.parametrize(
    ("volumes", "gone"),
    [
        ((0.11, 1800.0), (True, False)),
        ((1800.0, 29.0), (False, True)),
        ((1800.0, 60.0), (False, False)),
        ((20.0, 25.0), (False, False)),
        ((0.0, 0.0), (False, False)),
    ],
)
def test_specks_are_no_lung_but_two_bases_are(volumes: tuple[float, float], gone: tuple[bool, bool]) -> None:
    assert absent(volumes) == gone
