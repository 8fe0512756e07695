"""The phantom: exact masks that agree with the image, reproducible, oriented as promised."""

from __future__ import annotations

import cc3d
import numpy as np
import pytest

from models.phantom.draw import EXTRA_CHANCE, Extra, Phantom, phantom
from models.phantom.pneumonia import MINIMUM_LESION_MM3

SHAPE = (24, 64, 64)


@pytest.fixture(scope="module", params=[3, 11])
def diseased(request: pytest.FixtureRequest) -> Phantom:
    return phantom(request.param, shape=SHAPE, severity=3)


def test_types_and_shapes(diseased: Phantom) -> None:
    assert diseased.hu.dtype == np.int16
    assert diseased.lungs.dtype == np.uint8
    assert diseased.infection.dtype == np.bool_
    assert diseased.hu.shape == diseased.lungs.shape == diseased.infection.shape == SHAPE
    assert len(diseased.spacing) == 3
    assert diseased.hu.min() >= -1024


def test_infection_lies_in_the_lungs_and_is_denser_than_they_are(diseased: Phantom) -> None:
    assert diseased.infection.any()
    assert (diseased.lungs[diseased.infection] > 0).all()
    aerated = diseased.hu[(diseased.lungs > 0) & ~diseased.infection]
    assert np.median(diseased.hu[diseased.infection]) > np.median(aerated) + 150


def test_no_lesion_is_too_small_to_be_drawn(diseased: Phantom) -> None:
    sizes = np.bincount(cc3d.connected_components(diseased.infection, connectivity=6).ravel())[1:]
    assert sizes.min() * np.prod(diseased.spacing) >= MINIMUM_LESION_MM3


def test_lungs_are_air_within_a_body_and_hold_what_lungs_hold() -> None:
    drawn = phantom(5, shape=(50, 96, 96), severity=0, noise_hu=5.0)
    litres = [(drawn.lungs == side).sum() * np.prod(drawn.spacing) / 1e6 for side in (1, 2)]
    assert all(0.8 < volume < 5.5 for volume in litres)
    assert -920 < np.median(drawn.hu[drawn.lungs > 0]) < -700
    assert drawn.hu[0, :3].mean() < -950
    centre = drawn.hu[25, 48, 44:52]
    assert (centre > -300).any()


def test_axes_are_canonical() -> None:
    drawn = phantom(7, shape=(50, 96, 96), severity=0, noise_hu=5.0)
    _, y, x = np.indices(drawn.lungs.shape)
    assert x[drawn.lungs == 1].max() < x[drawn.lungs == 2].max()
    assert x[drawn.lungs == 1].mean() < 44 < 52 < x[drawn.lungs == 2].mean()
    bone = drawn.hu > 400
    spine = bone & (abs(x - 48) < 8)
    assert y[spine].mean() > 48, "the spine lies at the back"
    # The liver fills the lowest slice on the right, the apices are narrow.
    lung_area = (drawn.lungs > 0).sum((1, 2))
    assert lung_area[-3] < lung_area.max() / 3
    assert drawn.hu[1, 40:56, 25:40].mean() > -150


def test_the_seed_is_everything() -> None:
    first, again, other = (phantom(seed, shape=(8, 32, 32)) for seed in (1, 1, 2))
    assert np.array_equal(first.hu, again.hu)
    assert np.array_equal(first.infection, again.infection)
    assert first.spacing == again.spacing
    assert not np.array_equal(first.hu, other.hu)


def test_severity_orders_the_burden() -> None:
    def burden(severity: int) -> float:
        drawn = [phantom(seed, shape=SHAPE, severity=severity) for seed in (21, 22, 23)]
        return float(np.mean([p.infection.sum() / (p.lungs > 0).sum() for p in drawn]))

    burdens = [burden(severity) for severity in range(4)]
    assert burdens[0] == 0
    assert 0 < burdens[1] < burdens[2] < burdens[3] < 0.95


def test_a_given_spacing_is_kept() -> None:
    assert phantom(1, shape=(8, 32, 32), spacing=(30.0, 12.0, 11.0), severity=0).spacing == (30.0, 12.0, 11.0)


def with_and_without(seed: int, extra: Extra, severity: int = 0) -> tuple[Phantom, Phantom]:
    shape = (32, 96, 96)
    plain = phantom(seed, shape=shape, severity=severity, noise_hu=5.0)
    return plain, phantom(seed, shape=shape, severity=severity, noise_hu=5.0, extras=[extra])


@pytest.mark.parametrize("extra", ["nodules", "effusion", "atelectasis", "emphysema", "motion"])
def test_a_confounder_shows_and_is_no_infection(extra: Extra) -> None:
    plain, drawn = with_and_without(23, extra)
    assert not drawn.infection.any()
    change = drawn.hu.astype(int) - plain.hu
    assert (abs(change) > 100).sum() * np.prod(plain.spacing) > 300, "a reader would see it"
    litre_hu = change[plain.lungs > 0].sum() * np.prod(plain.spacing) / 1e6
    if extra != "motion":
        assert litre_hu < -1 if extra == "emphysema" else litre_hu > 0.1
    if extra == "effusion":
        fluid = (plain.lungs > 0) & (drawn.lungs == 0)
        assert fluid.sum() * np.prod(plain.spacing) > 5000
        assert -20 < np.median(drawn.hu[fluid]) < 50
        rows = np.indices(fluid.shape)[1]
        assert rows[fluid].mean() > rows[plain.lungs > 0].mean() + 5, "fluid lies at the back"
    else:
        assert np.array_equal(drawn.lungs, plain.lungs)


@pytest.mark.parametrize(("extra", "sign"), [("crazy paving", 1), ("air bronchograms", -1)])
def test_a_pattern_changes_what_lies_in_lesions_alone(extra: Extra, sign: int) -> None:
    plain, drawn = with_and_without(24, extra, severity=3)
    assert np.array_equal(drawn.lungs, plain.lungs)
    change = drawn.hu.astype(int) - plain.hu
    strong = abs(change) > 100
    assert strong.any()
    assert (sign * change[strong] > 0).mean() > 0.95
    assert (drawn.infection | plain.infection)[strong].mean() > 0.7


def test_extras_are_drawn_by_the_seed_as_often_as_they_say() -> None:
    def differs(seed: int) -> bool:
        small = {"shape": (8, 32, 32), "severity": 0}
        return not np.array_equal(phantom(seed, **small).hu, phantom(seed, extras=None, **small).hu)  # type: ignore[arg-type]

    confounders = [
        chance for extra, chance in EXTRA_CHANCE.items() if extra not in ("air bronchograms", "crazy paving")
    ]
    expected = 1 - np.prod([1 - chance for chance in confounders])
    assert abs(np.mean([differs(seed) for seed in range(40)]) - expected) < 0.2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"severity": 4}, "severity must be 0, 1, 2 or 3"),
        ({"shape": (4, 64, 64)}, "at least 8 voxels"),
        ({"spacing": (1.0, 0.0, 1.0)}, "positive numbers of mm"),
        ({"extras": ["gas"]}, "unknown extras"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        phantom(1, **arguments)  # type: ignore[arg-type]
