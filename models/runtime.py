"""Runtimes of a network: torch on a CUDA card; on a CPU OpenVINO, or torch where OpenVINO cannot run it.

A bundle may hold its network as OpenVINO IR beside the weights. The IR starts without torch, runs several times faster
on a CPU, and agrees with torch in float32 within 0.002 Dice (tests/models/test_runtime.py). That of the lungs is in
int8; the infection model does not agree that well in int8.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.registry import IR, BuiltBundle, Bundle, load_bundle, verified

log = logging.getLogger(__name__)

#: Slabs that go through torch at once, on a CPU and on a card.
_BATCH = {"cpu": 8, "cuda": 32}

#: Parameters of mallopt(3): allocations mapped separately, and free memory above which it is returned.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1

#: Compiled shapes kept in memory; a series needs one, and the fields of view within a hospital differ little.
_SHAPES = 8

_HALF = ("amx_bf16", "avx512_bf16")


class CardMemoryError(MemoryError):
    """A card has too little memory; a CPU may suffice."""


class Runtime(Protocol):
    """A network, ready to run."""

    @property
    def description(self) -> str:
        """What it runs on, for logs and benchmarks."""

    def run(self, slabs: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Logits [channel, y, x] of images [channel, y, x] of one shape, in their order."""


def open_runtime(bundle: Bundle, device: str | None = None) -> Runtime:
    """Open a bundle's network on the fastest runtime for it.

    Parameters
    ----------
    bundle
        The bundle.
    device
        'cpu' or 'cuda'; by default CUDA where there is a card.

    Raises
    ------
    BundleError
        Weights or IR are not what the metadata says, or do not fit the network.
    """
    if device is None:
        device = "cuda" if _has_card() else "cpu"
    if device == "cpu" and not isinstance(bundle, BuiltBundle):
        try:
            return OpenVinoRuntime(bundle)
        except NoIRError as reason:
            log.warning("the network '%s' runs on torch, several times slower: %s", bundle.name, reason)
    return TorchRuntime(bundle, device)


class OpenVinoRuntime:
    """OpenVINO on all cores: in int8 where the IR is, else in bfloat16 where CPU and network bear it.

    One slab per core gives the highest throughput, and a result that does not depend on the number of cores.
    """

    def __init__(self, bundle: Bundle) -> None:
        record = bundle.metadata.get("openvino")
        if not isinstance(record, dict):
            raise NoIRError("it comes without OpenVINO IR")
        if record.get("weights") != bundle.sha256:
            raise NoIRError("its OpenVINO IR was made of other weights")
        openvino = _openvino()
        xml, weights = (verified(bundle.path / file, str(record.get(file.name))) for file in IR)
        self._core = openvino.Core()
        self._model = self._core.read_model(xml, weights)
        half = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self._int8 = bool(record.get("int8"))
        self._precision = "bf16" if half and _bears_bfloat16(bundle) else "f32"
        self._compiled: dict[tuple[int, ...], Any] = {}

    @property
    def description(self) -> str:
        """What it runs on."""
        return f"OpenVINO {'int8 and ' if self._int8 else ''}{self._precision} on {cores()} cores"

    def run(self, slabs: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """See `Runtime.run`."""
        idle: list[Any] = []
        busy: deque[Any] = deque()
        made = False
        for slab in slabs:
            if not made:
                compiled = self._compile((1, *slab.shape))
                # One more than run at once, so that no core waits while the caller looks at a result.
                idle = [compiled.create_infer_request() for _ in range(cores() + 1)]
                made = True
            if not idle:
                yield self._finish(busy, idle)
            request = idle.pop()
            request.start_async([slab[None]])
            busy.append(request)
        while busy:
            yield self._finish(busy, idle)

    @staticmethod
    def _finish(busy: deque[Any], idle: list[Any]) -> NDArray[np.float32]:
        request = busy.popleft()
        request.wait()
        logits: NDArray[np.float32] = request.get_output_tensor().data[0].copy()
        idle.append(request)
        return logits

    def _compile(self, shape: tuple[int, ...]) -> Any:
        """The network for one input shape: fixed shapes run faster, and a tenth of a second compiles one."""
        if shape not in self._compiled:
            while len(self._compiled) >= _SHAPES:
                del self._compiled[next(iter(self._compiled))]
            model = self._model.clone()
            model.reshape(list(shape))
            options = {
                "INFERENCE_PRECISION_HINT": self._precision,
                "INFERENCE_NUM_THREADS": cores(),
                "NUM_STREAMS": cores(),
            }
            self._compiled[shape] = self._core.compile_model(model, "CPU", options)
        return self._compiled[shape]


class TorchRuntime:
    """torch, in half precision where the device computes in it."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        # channels-last feeds tensor cores and oneDNN without copies.
        try:
            module: Any = bundle.load(self._device)
            self._module = module.to(memory_format=torch.channels_last)
        except torch.OutOfMemoryError:
            raise CardMemoryError(f"{device} has too little memory for the network") from None
        if self._device.type == "cuda":
            self._type: Any = torch.float16
        else:
            torch.set_num_threads(cores())
            self._type = torch.bfloat16 if _bears_bfloat16(bundle) and _multiplies_bfloat16() else None

    @property
    def description(self) -> str:
        """What it runs on."""
        return f"torch {str(self._type or self._torch.float32).removeprefix('torch.')} on {self._device}"

    def run(self, slabs: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """See `Runtime.run`; raises `CardMemoryError`."""
        waiting = iter(slabs)
        while batch := list(islice(waiting, _BATCH[self._device.type])):
            yield from self._forward(batch)

    def _forward(self, batch: list[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Logits of a batch; one that is too much for the card goes through in halves."""
        torch, kind = self._torch, self._device.type
        logits, half_type = None, torch.autocast(kind, self._type, enabled=self._type is not None)
        with suppress(torch.OutOfMemoryError), torch.inference_mode(), half_type:
            images = torch.from_numpy(np.stack(batch))
            if kind == "cuda":
                images = images.pin_memory()
            images = images.to(self._device, non_blocking=True, memory_format=torch.channels_last)
            logits = self._module(images).float().contiguous().cpu().numpy()
        if logits is not None:
            yield from logits
            return
        if len(batch) == 1:
            raise CardMemoryError(f"{self._device} has too little memory even for one slab")
        log.warning("%s has too little memory for %d slabs at once, taking half", self._device, len(batch))
        torch.cuda.empty_cache()
        yield from self._forward(batch[: len(batch) // 2])
        yield from self._forward(batch[len(batch) // 2 :])


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory() -> None:
    """Have this process keep the memory that it frees, for its next analysis.

    Volumes are hundreds of megabytes. glibc returns such allocations at once, and getting them again page by page costs
    a fifth of an analysis. With another C library nothing changes.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def export(path: Path, examples: Sequence[NDArray[np.float32]] = ()) -> None:
    """Write a bundle's network as OpenVINO IR beside its weights, and its digests into the metadata.

    Parameters
    ----------
    path
        The bundle's folder.
    examples
        Images [1, channel, y, x] as the network gets them, whose sizes may differ. Where there are some, convolutions
        are brought to int8 by the ranges of values that these show (NNCF, post-training quantisation).

    Raises
    ------
    NoIRError
        OpenVINO is not there, does not know something in the network, or computes something else than torch does.
    """
    import torch

    bundle = load_bundle(path)
    channels = 2 * int(bundle.metadata.get("context", 0)) + 1
    side = 4 * int(bundle.metadata["stride"])
    example = torch.zeros(1, channels, side, side)
    network = bundle.load()
    openvino = _openvino()
    try:
        with warnings.catch_warnings():
            # torch deprecates traces, but OpenVINO still reads them best.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
        model = openvino.convert_model(traced, input=[[-1, channels, -1, -1]])
    except RuntimeError as error:
        raise NoIRError(f"OpenVINO cannot take the network: {str(error).splitlines()[0]}") from None
    # Another shape than that of the trace: decisions that a network takes by shape are not traced.
    image = torch.linspace(-1, 1, channels * 6 * side * side).reshape(1, channels, 2 * side, 3 * side).sin()
    plain = {"INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(model, "CPU", plain)([image.numpy()])[0]
    with torch.inference_mode():
        expected = network(image).numpy()
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise NoIRError("OpenVINO computes something else than torch does")
    if examples:
        model = _quantised(model, examples)
    # Half the size; weights lose less by it than every product does in bfloat16.
    openvino.save_model(model, path / IR[0], compress_to_fp16=True)
    record = {
        "version": openvino.__version__,
        "weights": bundle.sha256,
        "int8": bool(examples),
        **{part.name: hashlib.sha256((path / part).read_bytes()).hexdigest() for part in IR},
    }
    text = json.dumps(bundle.metadata | {"openvino": record}, indent=2) + "\n"
    (path / "configs" / "metadata.json").write_text(text, encoding="utf-8")


def _quantised(model: Any, examples: Sequence[NDArray[np.float32]]) -> Any:
    import nncf

    logging.getLogger("nncf").setLevel(logging.WARNING)
    # Activations may be below zero as well as above, weights are about it.
    mixed = nncf.QuantizationPreset.MIXED
    return nncf.quantize(model, nncf.Dataset(examples), preset=mixed, subset_size=len(examples))


class NoIRError(Exception):
    """The network cannot run on OpenVINO here; the message says why."""


def _openvino() -> Any:
    # Without this, importing OpenVINO reports to Google Analytics; a clinical network must stay silent.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise NoIRError(
            f"OpenVINO cannot be imported ({error.__class__.__name__}); install the package openvino"
        ) from None
    return openvino


def _bears_bfloat16(bundle: Bundle) -> bool:
    """Whether a network keeps its Dice in bfloat16: its publisher measures that, `bfloat16` in the metadata."""
    return bool(bundle.metadata.get("bfloat16", True))


def _has_card() -> bool:
    """Whether torch sees a CUDA card; torch, which takes seconds to import, is asked only where there is a driver."""
    try:
        ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return False
    import torch

    return bool(torch.cuda.is_available())


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16; emulated it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return any(name in flags for name in _HALF)
