"""The one network builder: a bundle's `network_def` → a network.

A definition is untrusted data. MONAI's own parser resolves dotted names by attribute and calls the result, so it is not
used here: a definition must name exactly one class of the table below, with plain values as arguments. Nothing else of
a bundle is evaluated. A network is first built without memory (torch's meta device), under limits that hold whatever
its arguments mean.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from models.registry import BundleError, shown

#: Our networks, by module of `models.networks`.
_OWN: Final = {
    "EfficientNetUNet": "efficientnet_unet",
    "UNetR231": "unet_r231",
    "XceptionUNet": "xception_unet",
}

#: MONAI's networks, by module of `monai.networks.nets`: those whose arguments are plain values, that can be built
#: without memory, and that need no package which we do not install. UNETR and SwinUNETR need einops; the functions
#: (`resnet18`) and EfficientNetBN fetch weights.
_MONAI: Final = {
    "AttentionUnet": "attentionunet",
    "BasicUNet": "basic_unet",
    "BasicUNetPlusPlus": "basic_unetplusplus",
    "DenseNet121": "densenet",
    "DenseNet169": "densenet",
    "DenseNet201": "densenet",
    "DynUNet": "dynunet",
    "FlexibleUNet": "flexible_unet",
    "HighResNet": "highresnet",
    "MedNeXt": "mednext",
    "SEResNet50": "senet",
    "SegResNet": "segresnet",
    "SegResNetDS": "segresnet_ds",
    "UNet": "unet",
    "VNet": "vnet",
}

#: Allowed `_target_` → module and class. MONAI's networks have the three spellings that MONAI itself accepts.
NETWORKS: Final[Mapping[str, tuple[str, str]]] = {
    **{f"models.networks.{file}.{name}": (f"models.networks.{file}", name) for name, file in _OWN.items()},
    **{
        spelling: (f"monai.networks.nets.{file}", name)
        for name, file in _MONAI.items()
        for spelling in (name, f"monai.networks.nets.{name}", f"monai.networks.nets.{file}.{name}")
    },
}

#: Refused arguments: they download weights.
_REFUSED: Final = frozenset(("pretrained", "progress"))

#: The largest number, and the longest list or text, among the arguments; the widest networks stay below.
_MOST, _LONGEST = 4096, 64
#: Lists in lists: kernel sizes by level and axis.
_DEEPEST = 3
#: The most modules and numbers of a network: those of the table have up to 500 modules, and 2 GB of weights in
#: float32 are the most that an archive may hold.
_MOST_MODULES, _MOST_WEIGHTS = 5_000, 500_000_000


def build(network_def: Mapping[str, Any], device: str = "cpu") -> nn.Module:
    """Build a network, with weights that are not trained.

    Parameters
    ----------
    network_def
        As in the `inference.json` of a MONAI bundle: `_target_`, a name of `NETWORKS`, and the class's arguments, which
        are numbers, texts, booleans, null, or lists of these.
    device
        'cpu', or 'meta' for a network that takes no memory until weights are assigned to it.

    Raises
    ------
    BundleError
        The definition names no class of the table, holds anything but plain values, does not fit the class, or makes a
        network that is too large. Nothing was run but that class.
    """
    made, arguments = network_class(network_def), _arguments(network_def)
    try:
        # Constructors warn about odd arguments; running the network shows whether they are right.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device("meta"), _limits():
                network = made(**arguments)
            return network if device == "meta" else made(**arguments)
    except BundleError:
        raise
    except Exception as error:  # a constructor may raise anything on arguments that it was not written for
        what = f"{type(error).__name__}: {shown(error)}"
        raise BundleError(f"network_def: {made.__name__} cannot be built with these arguments ({what})") from None


def network_class(network_def: Mapping[str, Any]) -> type[nn.Module]:
    """The class that a definition names; raises `BundleError` unless it is one of `NETWORKS`."""
    target = network_def.get("_target_") if isinstance(network_def, Mapping) else None
    if not isinstance(target, str):
        raise BundleError("network_def: '_target_', the name of a network, is missing or no text")
    if target not in NETWORKS:
        names = ", ".join(sorted((*_OWN, *_MONAI)))
        raise BundleError(f"network_def: '_target_' '{shown(target)}' is no network that can be built here ({names})")
    module, name = NETWORKS[target]
    found: type[nn.Module] = vars(import_module(module))[name]
    return found


def _arguments(network_def: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a definition, every one checked."""
    found = {key: value for key, value in network_def.items() if key != "_target_"}
    if len(found) > _LONGEST:
        raise BundleError(f"network_def: has {len(found)} arguments; no network takes over {_LONGEST}")
    for key, value in found.items():
        if not isinstance(key, str) or not key.isidentifier() or key.startswith("_") or key in _REFUSED:
            raise BundleError(f"network_def: '{shown(key)}' is no argument of a network")
        _check(value, key, 0)
    return found


def _check(value: object, key: str, depth: int) -> None:
    """Refuse all but plain values: expressions ($), references (@) and macros (%), which MONAI would run, above all."""
    where = f"network_def: {shown(key)}"
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int | float):
        if not abs(value) <= _MOST:  # nor is NaN
            raise BundleError(f"{where}: a number is not within ±{_MOST}")
    elif isinstance(value, str):
        if len(value) > _LONGEST or value[:1] in ("$", "@", "%"):
            raise BundleError(f"{where}: '{shown(value)}' is an expression or too long; only plain values can be used")
    elif isinstance(value, list | tuple):
        if len(value) > _LONGEST or depth >= _DEEPEST:
            raise BundleError(f"{where}: a list is longer than {_LONGEST} or lies deeper than {_DEEPEST}")
        for one in value:
            _check(one, key, depth + 1)
    else:
        raise BundleError(f"{where}: is neither number, text, boolean, null nor a list of these")


@contextmanager
def _limits() -> Iterator[None]:
    """Bound what this thread builds: each module and parameter is counted when it becomes part of another."""
    thread, count = threading.get_ident(), [0, 0]

    def add(modules: int, weights: int) -> None:
        if threading.get_ident() != thread:
            return
        count[0] += modules
        count[1] += weights
        if count[0] > _MOST_MODULES or count[1] > _MOST_WEIGHTS:
            raise BundleError(f"network_def: makes over {_MOST_MODULES:,} modules or {_MOST_WEIGHTS:,} weights")

    def module(_parent: nn.Module, _name: str, _child: nn.Module | None) -> None:
        add(1, 0)

    def parameter(_parent: nn.Module, _name: str, child: torch.Tensor | None) -> None:
        add(0, 0 if child is None else child.numel())

    handles = (
        torch_module.register_module_module_registration_hook(module),
        torch_module.register_module_parameter_registration_hook(parameter),
        torch_module.register_module_buffer_registration_hook(parameter),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
