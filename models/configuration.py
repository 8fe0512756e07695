"""What a bundle's `configs/` hold: how `python -m monai.bundle run` runs it, and what MONAI's schema asks of metadata.

The node reads only `network_def` and the keys that `models/README.md` lists. The rest of `inference.json` is for MONAI:
it names MONAI's components and the inferers of `models.segmenter.inferers`, so that a bundle writes the node's masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

#: The schema of `metadata.json` that bundles are written for.
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"

#: What running a bundle needs besides MONAI itself: lungnode for its networks and inferers, and the extra `bundle`.
REQUIRED_PACKAGES = {"fire": "0.7", "nibabel": "5.4", "pytorch-ignite": "0.5.5"}

#: Role → inferer, and the parameters of the configuration that it takes besides the bundle's folder.
_INFERERS = {"lungs": ("LungInferer", {}), "infection": ("InfectionInferer", {"lungs": "lungs"})}

#: Axes of arrays in `models`: from inferior to superior, from anterior to posterior, from patient right to left.
_CANONICAL = "SPL"


def inference_config(role: str, network_def: Mapping[str, Any]) -> dict[str, Any]:
    """`inference.json` of a bundle.

    It reads one volume, `image`, in HU: a NIfTI file, or a folder that holds the slices of one DICOM series. It writes
    one mask of the same grid, a NIfTI file in `output_dir`: of the lungs 1 right and 2 left, of infection 1. A bundle
    of infection searches the lungs that another bundle, `lungs`, finds first: by name one of those that come with the
    program, or a folder.

    Parameters
    ----------
    role
        'lungs' or 'infection'.
    network_def
        As `models.build.build` takes it.
    """
    inferer, parameters = _INFERERS[role]
    return {
        "imports": ["$import torch", "$from pathlib import Path", "$from safetensors.torch import load_file"],
        "bundle_root": ".",
        "image": "scan.nii.gz",
        "dataset_dir": "$str(Path(@image).parent)",
        "output_dir": "$str(Path(@bundle_root) / 'eval')",
        **parameters,
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": dict(network_def),
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": _CANONICAL, "labels": None},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "$[{'image': @image}]", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {
            "_target_": f"models.segmenter.inferers.{inferer}",
            "bundle_root": "@bundle_root",
            **{name: f"@{name}" for name in parameters},
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "nearest_interp": True,
                    "to_tensor": True,
                },
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": role,
                    "output_dtype": "$torch.uint8",
                    "separate_folder": False,
                    "resample": False,
                },
            ],
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "initialize": [
            "$@network.load_state_dict(load_file(str(Path(@bundle_root) / 'models' / 'model.safetensors')))"
        ],
        "run": ["$@evaluator.run()"],
    }


def schema_metadata(description: str) -> dict[str, Any]:
    """The keys that MONAI's schema requires of `metadata.json` and that all our bundles have alike.

    Parameters
    ----------
    description
        What the bundle does, in a sentence or two.
    """
    return {
        "schema": SCHEMA,
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"lungnode": version("lungnode"), **REQUIRED_PACKAGES},
        "description": description,
        "authors": "the lungnode developers",
        "copyright": "the lungnode developers; see 'license' and 'data_source' for the weights",
    }


def data_format(inputs: int, spatial_shape: list[str], output: str, channels: dict[str, str]) -> dict[str, Any]:
    """`network_data_format` of the metadata, as MONAI's schema has it.

    Parameters
    ----------
    inputs
        Channels of the image: a slice and its neighbours.
    spatial_shape
        Height and width, as expressions of the schema: '16*n', '*'.
    output
        What the output's numbers are.
    channels
        Class of each output channel, or of each label where the output is a softmax.
    """
    image = {
        "type": "image",
        "format": "hounsfield",
        "modality": "CT",
        "num_channels": inputs,
        "spatial_shape": spatial_shape,
        "dtype": "float32",
        "value_range": [-1, 1],
        "is_patch_data": False,
    }
    prediction = {
        "type": "segmentation",
        "format": output,
        "num_channels": len(channels),
        "spatial_shape": spatial_shape,
        "dtype": "float32",
        # Logits have no range.
        "value_range": [],
        "channel_def": channels,
    }
    return {"inputs": {"image": image}, "outputs": {"pred": prediction}}
