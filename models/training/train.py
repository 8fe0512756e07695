"""Train one of the two networks: `python -m models.training.train lungs|infection --data DIR --minutes N --seed S`.

The time is given, not the number of steps: the learning rate falls along a cosine over it. An exponential moving
average of the weights is what is kept. A run that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.losses.dice import DiceCELoss
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandHistogramShiftd,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from monai.transforms.spatial.dictionary import RandAffined
from monai.transforms.transform import RandomizableTransform
from numpy.typing import NDArray
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from models.networks.xception_unet import XceptionUNet
from models.training import datasets
from models.training.datasets import Patient

Task = Literal["lungs", "infection"]

#: HU that the networks see; all beyond is clipped. Mapped to -1 ... 1.
HU_RANGE = (-1000.0, 400.0)


@dataclass(frozen=True)
class Plan:
    """What differs between the tasks."""

    network: dict[str, Any]
    #: Pixels of the square that is cut out, at `datasets.PIXEL_MM`.
    crop: int
    batch: int
    learning_rate: float
    #: Share of each source in a batch: the sets differ a hundredfold in size.
    shares: dict[str, float]


PLANS: dict[Task, Plan] = {
    "lungs": Plan(
        network={"in_channels": 1, "out_channels": 3, "features": [24, 48, 96, 128, 192], "middle_blocks": 3},
        crop=256,
        batch=8,
        learning_rate=2e-3,
        shares={"finding-lungs": 0.30, "covid-seg-20": 0.30, "medseg-9": 0.15, "phantom": 0.25},
    ),
    "infection": Plan(
        network={"in_channels": 1, "out_channels": 1, "features": [32, 64, 128, 192, 256], "middle_blocks": 4},
        crop=192,
        batch=12,
        learning_rate=2e-3,
        shares={"covid-seg-20": 0.45, "medseg-9": 0.13, "semiseg": 0.15, "phantom": 0.15, "finding-lungs": 0.12},
    ),
}

#: Seeds of the phantoms to learn from; those to validate and test on lie elsewhere.
TRAINING_PHANTOMS = range(1000, 1048)
VALIDATION_PHANTOMS = range(2000, 2008)
TEST_PHANTOMS = range(3000, 3012)


def patients_of(task: Task, data: Path) -> list[Patient]:
    """All real patients that a task can learn from; `data` is the folder that holds `slices/`."""
    slices = data / "slices"
    patients = datasets.covid_seg_20(slices) + datasets.medseg_9(slices)
    if task == "lungs":
        return patients + datasets.finding_lungs(slices)
    return patients + datasets.semiseg(slices) + datasets.healthy_finding_lungs(slices)


def normalise(hu: NDArray[np.int16] | NDArray[np.float32]) -> NDArray[np.float32]:
    """HU to the -1 ... 1 that the networks take."""
    low, high = HU_RANGE
    scaled: NDArray[np.float32] = (np.clip(hu, low, high).astype(np.float32) - (low + high) / 2) * (2 / (high - low))
    return scaled


def train(task: Task, data: Path, minutes: float, seed: int, out: Path, threads: int = 1) -> Path:
    """Train and return the path of the averaged weights (`model.safetensors` in `out`)."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    plan = PLANS[task]
    patients = list(datasets.split(patients_of(task, data), seed).train) + datasets.phantoms(
        TRAINING_PHANTOMS, slices=20
    )
    loader = DataLoader(_Slices(task, patients, seed), batch_size=plan.batch, num_workers=1, prefetch_factor=4)
    model = XceptionUNet(**plan.network)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaging = get_ema_multi_avg_fn(0.997)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=averaging, use_buffers=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=1e-4)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    step, spent = _resume(checkpoint, model, average, optimiser)
    loss_of = _loss(task)
    budget, smooth, last_saved = minutes * 60, float("nan"), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(task, total=budget, completed=int(spent))
        tick = time.monotonic()
        for image, target in loader:
            rate = _rate(plan.learning_rate, step, spent / budget)
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss = _step(model, loss_of, optimiser, image, target)
            if step >= 200:
                average.update_parameters(model)
            else:
                average.module.load_state_dict(model.state_dict())
            step += 1
            smooth = loss if np.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            now = time.monotonic()
            spent, tick = spent + now - tick, now
            progress.update(bar, completed=min(spent, budget), description=f"{task} step {step} loss {smooth:.3f}")
            if step % 100 == 0:
                logging.info("%s step %d, %.0f s, loss %.4f", task, step, spent, smooth)
            if now - last_saved > 120 or spent >= budget:
                _save(checkpoint, model, average, optimiser, step, spent)
                save_file(_weights(average), out / "model.safetensors")
                last_saved = now
            if spent >= budget:
                break
    return out / "model.safetensors"


class _Slices(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless augmented slices, drawn by source and then by patient, diseased slices more often."""

    def __init__(self, task: Task, patients: list[Patient], seed: int) -> None:
        self.plan, self.task, self.seed = PLANS[task], task, seed
        self.sources = {
            source: [patient for patient in patients if patient.source == source] for source in self.plan.shares
        }
        self.sources = {source: members for source, members in self.sources.items() if members}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, 0 if worker is None else worker.seed])
        augment = _augmentation(self.plan.crop)
        augment.set_random_state(int(rng.integers(1 << 31)))
        names = list(self.sources)
        share = np.array([self.plan.shares[name] for name in names])
        while True:
            members = self.sources[names[rng.choice(len(names), p=share / share.sum())]]
            patient = members[rng.integers(len(members))]
            index = self._slice(rng, patient)
            target = self._target(patient, index)
            hu = patient.hu[index].astype(np.float32)
            if self.task == "lungs" and rng.random() < 0.3:
                hu = np.where(datasets.body(patient.hu[index]), hu, -1000.0).astype(np.float32)
            if rng.random() < 0.5:
                hu, target = hu[:, ::-1], target[:, ::-1]
                if self.task == "lungs":
                    target = np.array([0, 2, 1], np.uint8)[target]
            hu, target = _crop(rng, hu, target, _window(patient, index), self.plan.crop)
            item = augment({"image": torch.from_numpy(normalise(hu))[None], "target": torch.from_numpy(target)[None]})
            image = item["image"].as_tensor().float().clamp(-1, 1)
            yield image, item["target"].as_tensor().float()

    def _slice(self, rng: np.random.Generator, patient: Patient) -> int:
        wanted = patient.infection if self.task == "infection" else patient.lungs
        if wanted is not None and rng.random() < (0.6 if self.task == "infection" else 0.8):
            filled = np.flatnonzero(wanted.any((1, 2)))
            if len(filled):
                return int(filled[rng.integers(len(filled))])
        return int(rng.integers(len(patient.hu)))

    def _target(self, patient: Patient, index: int) -> NDArray[np.uint8]:
        mask = patient.infection if self.task == "infection" else patient.lungs
        if mask is None:
            raise ValueError(f"{patient.id} has no mask of {self.task}")
        drawn: NDArray[np.uint8] = mask[index].astype(np.uint8)
        return drawn


class _ScannerVariety(RandomizableTransform):
    """The reconstruction circle, and a window's clipping: what 8-bit sources and old scanners do to a slice."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Change `image` in place of the item."""
        image = item["image"]
        if self.R.random() < 0.15:
            size = image.shape[-1]
            y, x = np.ogrid[:size, :size]
            radius = self.R.uniform(0.47, 0.6) * size
            outside = (y - size / 2) ** 2 + (x - size / 2) ** 2 > radius**2
            image[:, torch.from_numpy(outside)] = -1.0
        if self.R.random() < 0.3:
            image = image.clamp(-1, self.R.uniform(0.3, 0.9))
        item["image"] = image
        return item


def _augmentation(crop: int) -> Compose:
    """Pose, then what carries CLAHE and lung windows to plain HU: monotone curves, gamma, gain, offset, blur, noise."""
    return Compose(
        [
            RandAffined(
                keys=("image", "target"),
                prob=0.8,
                rotate_range=0.17,
                scale_range=(0.18, 0.18),
                shear_range=(0.05, 0.05),
                translate_range=12,
                spatial_size=(crop, crop),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandHistogramShiftd(keys="image", num_control_points=(5, 9), prob=0.3),
            RandAdjustContrastd(keys="image", prob=0.4, gamma=(0.65, 1.5), retain_stats=False),
            RandScaleIntensityd(keys="image", factors=0.12, prob=0.5),
            RandShiftIntensityd(keys="image", offsets=0.08, prob=0.6),
            RandGaussianSmoothd(keys="image", sigma_x=(0.4, 1.2), sigma_y=(0.4, 1.2), prob=0.25),
            RandGaussianNoised(keys="image", prob=0.4, std=0.07),
            _ScannerVariety(),
        ]
    )


def _window(patient: Patient, index: int) -> tuple[float, float]:
    """Centre (y, x) of what matters in a slice: the lungs where they are known."""
    if patient.lungs is not None and patient.lungs[index].any():
        rows, columns = (np.flatnonzero(patient.lungs[index].any(axis)) for axis in (1, 0))
        return (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    return patient.hu.shape[1] / 2, patient.hu.shape[2] / 2


def _crop(
    rng: np.random.Generator,
    hu: NDArray[np.float32],
    target: NDArray[np.uint8],
    centre: tuple[float, float],
    size: int,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Cut a square about the centre, or pad with air."""
    images = np.full((size, size), -1024.0, np.float32), np.zeros((size, size), np.uint8)
    low = [round(c + rng.uniform(-0.06, 0.06) * size) - size // 2 for c in centre]
    here = tuple(slice(max(o, 0), min(o + size, n)) for o, n in zip(low, hu.shape, strict=True))
    there = tuple(slice(s.start - o, s.stop - o) for s, o in zip(here, low, strict=True))
    images[0][there], images[1][there] = hu[here], target[here]
    return images


def _rate(top: float, step: int, done: float) -> float:
    """Learning rate: up over 100 steps, down along a cosine to a hundredth."""
    return top * min(1.0, (step + 1) / 100) * (0.01 + 0.495 * (1 + math.cos(math.pi * min(done, 1.0))))


def _loss(task: Task) -> nn.Module:
    if task == "lungs":
        return DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
    return DiceCELoss(sigmoid=True, batch=True, lambda_ce=1.0)


def _step(
    model: nn.Module, loss_of: nn.Module, optimiser: torch.optim.Optimizer, image: Tensor, target: Tensor
) -> float:
    """One update. bf16 with channels last is 2 to 3 times as fast as fp32 on a CPU with AVX-512 BF16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(image.contiguous(memory_format=torch.channels_last))
    loss = loss_of(logits.float().contiguous(), target)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimiser.step()
    return float(loss)


def _weights(average: AveragedModel) -> dict[str, Tensor]:
    """Averaged weights in half precision, which the networks lose nothing by."""
    state = average.module.state_dict()
    return {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}


def _save(
    path: Path, model: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer, step: int, spent: float
) -> None:
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "spent": spent,
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _resume(path: Path, model: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"]), float(state["spent"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(PLANS))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds slices/")
    parser.add_argument("--minutes", type=float, required=True, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of checkpoint and weights; default build/training/TASK")
    parser.add_argument("--threads", type=int, default=1, help="more than one stall each other on busy cores")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    out = arguments.out or Path("build/training") / arguments.task
    weights = train(arguments.task, arguments.data, arguments.minutes, arguments.seed, out, arguments.threads)
    logging.info("weights: %s", weights)


if __name__ == "__main__":
    main()
