"""Makes the node of the fault tests quick: on its PYTHONPATH, read by each of its processes as it starts.

A threshold stands in for the networks, which would take a minute for each of a hundred series and are not what is
tested here, and waits that are meant for a night in a hospital are cut to seconds. All else is the node as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage

from models.registry import ModelIdentity
from node import ledger, tasks
from node.delivery import outbox
from node.intake import assembly

ledger.LEASE_S = 4.0
ledger.RING_AGAIN_S = 2.0
ledger.BACKOFF = {"analyse": (1.0, 1.5, 5.0), "deliver": (1.0, 1.5, 5.0), "line": (1.0, 1.5, 5.0)}
outbox.LINGER_S = 0.5
assembly.RETRY_S = 1.0
tasks.SWEEP_S = 0.5


class _Threshold:
    identities = (ModelIdentity("lungs", "0", "a" * 64), ModelIdentity("infection", "0", "b" * 64))

    def __call__(self, hu: Any, _spacing: Any, _tell: Any) -> Any:
        from models.inference import Segmentation

        air, _ = ndimage.label(hu < -400)
        outside = np.unique(np.concatenate([air[:, 0].ravel(), air[:, -1].ravel(), air[:, :, 0].ravel()]))
        inside = (air > 0) & ~np.isin(air, outside)
        half = hu.shape[2] // 2
        lungs = np.zeros(hu.shape, np.uint8)
        lungs[:, :, :half], lungs[:, :, half:] = inside[:, :, :half], 2 * inside[:, :, half:]
        dense = inside & (hu > -650)
        return Segmentation(lungs, dense.astype(np.float16), 0.5)


tasks.segmenter = lambda *_: _Threshold()
