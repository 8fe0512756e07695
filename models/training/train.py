"""Train one of the two networks: `python -m models.training.train lungs|infection --data DIR --minutes N --seed S`.

The time is given, not the number of steps: the learning rate falls along a cosine over it. An exponential moving
average of the weights is what is kept. A run that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.losses.dice import DiceCELoss
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from models.networks.xception_unet import XceptionUNet
from models.training import datasets
from models.training.datasets import Patient
from models.training.sampling import Slices, Task


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

#: Time between checkpoints, s.
CHECKPOINT_SECONDS = 120.0

#: Steps before the average begins, over which the learning rate, in the first half of them, rises.
WARM_UP_STEPS = 200

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


def train(task: Task, data: Path, minutes: float, seed: int, out: Path) -> Path:
    """Train on the training part of the public data and on phantoms; see `fit`."""
    patients = datasets.split(patients_of(task, data), seed).train
    return fit(task, [*patients, *datasets.phantoms(TRAINING_PHANTOMS, slices=20)], minutes, seed, out)


def fit(task: Task, patients: Sequence[Patient], minutes: float, seed: int, out: Path) -> Path:
    """Train until `minutes` have been spent, those before an interruption included.

    Returns
    -------
    Path
        The averaged weights, `model.safetensors` in `out`; `checkpoint.pt` beside it is where a run goes on.
    """
    torch.manual_seed(seed)
    plan, budget = PLANS[task], minutes * 60
    run = _Run(task, out)
    slices = Slices(task, patients, plan.shares, plan.crop, (seed, run.step))
    smooth, tick = float("nan"), time.monotonic()
    saved = tick
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(task, total=budget, completed=int(run.spent))
        for image, target in DataLoader(slices, batch_size=plan.batch, num_workers=1, prefetch_factor=4):
            if run.spent >= budget:
                break
            loss = run.advance(image, target, _rate(plan.learning_rate, run.step, run.spent / budget))
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            now = time.monotonic()
            run.spent, tick = run.spent + now - tick, now
            progress.update(bar, completed=run.spent, description=f"{task} step {run.step} loss {smooth:.3f}")
            if run.step % 100 == 0:
                logging.info("%s step %d, %.0f s, loss %.4f", task, run.step, run.spent, smooth)
            if now - saved > CHECKPOINT_SECONDS:
                run.save()
                saved = now
    return run.save()


class _Run:
    """The state of a training run, and its checkpoint."""

    def __init__(self, task: Task, out: Path) -> None:
        self.out, self.step, self.spent = out, 0, 0.0
        self.model = XceptionUNet(**PLANS[task].network)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        averaging = get_ema_multi_avg_fn(0.997)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(self.model, multi_avg_fn=averaging, use_buffers=True)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), weight_decay=1e-4)
        self.loss = _loss(task)
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            state = torch.load(out / "checkpoint.pt", weights_only=True)
            for name in ("model", "average", "optimiser"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.spent = state["step"], state["spent"]

    def advance(self, image: Tensor, target: Tensor, rate: float) -> float:
        """One update; returns the loss.

        bf16 with channels last is 2 to 3 times as fast as fp32 on a CPU with AVX-512 BF16.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(image.contiguous(memory_format=torch.channels_last))
        loss: Tensor = self.loss(logits.float().contiguous(), target)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimiser.step()
        self.step += 1
        if self.step > WARM_UP_STEPS:
            self.average.update_parameters(self.model)
        else:
            self.average.module.load_state_dict(self.model.state_dict())
        return float(loss.detach())

    def save(self) -> Path:
        """Write checkpoint and averaged weights, those in half precision, which the networks lose nothing by."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimiser")}
        part = self.out / "checkpoint.part"
        torch.save(parts | {"step": self.step, "spent": self.spent}, part)
        part.replace(self.out / "checkpoint.pt")
        state = self.average.module.state_dict()
        halves = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
        save_file(halves, self.out / "model.safetensors")
        return self.out / "model.safetensors"


def _rate(top: float, step: int, done: float) -> float:
    """Learning rate: up over the warm-up's first half, down along a cosine to a hundredth."""
    return top * min(1.0, 2 * (step + 1) / WARM_UP_STEPS) * (0.01 + 0.495 * (1 + math.cos(math.pi * min(done, 1.0))))


def _loss(task: Task) -> nn.Module:
    if task == "lungs":
        return DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
    return DiceCELoss(sigmoid=True, batch=True, lambda_ce=1.0)


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
    torch.set_num_threads(arguments.threads)
    weights = train(arguments.task, arguments.data, arguments.minutes, arguments.seed, out)
    logging.info("weights: %s", weights)


if __name__ == "__main__":
    main()
