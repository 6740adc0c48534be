"""LIME, KernelSHAP and occlusion by captum, of any function that can do without some features.

All three work on the vector that says which features are kept, ones for all of them, and never see the model's inputs:
so the function may be an ONNX model, its features tokens, and two models get the same perturbations from one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import KernelShap, Lime, Occlusion
from captum.attr._core.lime import get_exp_kernel_similarity_function
from numpy.typing import NDArray

from onnx_lathe.benchmarks.stats import Vector

Score = Callable[[NDArray[np.bool_]], Vector]
"""From which features are kept, ``bool [batch, features]``, to the number to explain, ``float64 [batch]``."""

_KERNEL_WIDTH = 0.25
_RIDGE = 1.0


def explain(method: str, score: Score, features: int, *, evaluations: int, batch: int, seed: int) -> Vector:
    """Return the weight of each feature, ``float64 [features]``.

    - ``lime``: the coefficients of a ridge regression on random subsets, weighed by ``exp(-d^2 / (2 0.25^2))`` with d
      their cosine distance to all features: the choices of the reference implementation (Ribeiro, Singh & Guestrin
      2016, equations 1 and 2; package ``lime``, ``LimeImageExplainer``).
    - ``kernel-shap``: Shapley values by weighted least squares on random subsets (Lundberg & Lee 2017, theorem 2).
    - ``occlusion``: what the number loses without that feature (Zeiler & Fergus 2014). Nothing in it is random.

    Args:
        method: One of `METHODS`.
        score: What is explained.
        features: How many there are.
        evaluations: How many subsets are drawn.
        batch: How many are evaluated at once.
        seed: Fixes the draws.
    """

    def forward(kept: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(score(kept.numpy() > 0.5))

    whole = torch.ones(1, features)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        weights = METHODS[method](forward, whole, evaluations, batch)
    return weights.numpy().reshape(-1).astype(np.float64)


def _occlusion(forward: Any, whole: torch.Tensor, evaluations: int, batch: int) -> torch.Tensor:
    del evaluations
    return Occlusion(forward).attribute(whole, sliding_window_shapes=(1,), baselines=0, perturbations_per_eval=batch)


def _sampled(
    make: Callable[[Any], Any], forward: Any, whole: torch.Tensor, evaluations: int, batch: int
) -> torch.Tensor:
    return make(forward).attribute(whole, baselines=0, n_samples=evaluations, perturbations_per_eval=batch)


def _lime(forward: Any) -> Lime:
    kernel = get_exp_kernel_similarity_function("cosine", _KERNEL_WIDTH)
    return Lime(forward, interpretable_model=SkLearnRidge(alpha=_RIDGE), similarity_func=kernel)


METHODS: Mapping[str, Callable[[Any, torch.Tensor, int, int], torch.Tensor]] = {
    "lime": partial(_sampled, _lime),
    "kernel-shap": partial(_sampled, KernelShap),
    "occlusion": _occlusion,
}
