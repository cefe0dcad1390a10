"""The merge methods: each a short function on tensors, with its name, its paper and its needs.

A method merges one parameter. Its arguments are some of these; sequences have an item for each
expert:

- ``experts``: the experts' tensors, of any floating dtype, not to be changed; ``base``: the base's.
- ``coefficients``: ``lambda_j``, at least zero and not all zero.
- ``fisher``: the experts' Fisher information, broadcastable against the parameter.
- ``is_linear_map``: whether the parameter is the matrix [rows, n] of a linear map.
- ``grams``: Gram matrices of the inputs, float64 [n, n], of a linear map; else None.
- ``generators``: of random numbers, the same whatever the order of the experts.
- ``density``, ``damping``: settings.

To add a method, write its function here, with the decorator `method`. So that the command line
starts fast, this module does not import PyTorch; functions import what they need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

if TYPE_CHECKING:
    from torch import Generator, Tensor

Tensors: TypeAlias = "Sequence[Tensor]"
Coefficients: TypeAlias = Sequence[float]
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Tuning(NamedTuple):
    """The values of a method's settings that are "auto".

    Attributes:
        normalise, exponent: for the Fisher information (`fmn.fisher.architectures.tempered`).
        growth: the merged task vector is scaled by this power of the effective number of task
            vectors (`fmn.merge.model.effective_number`); 0: it is not scaled.
        most: the largest scale.
    """

    normalise: str = "none"
    exponent: float = 1.0
    growth: float = 0.0
    most: float = math.inf

    def scale(self, effective_number: float) -> float:
        """The scale of the merged task vector, to three decimals; 1 where all experts are equal."""
        return round(min(math.pow(effective_number, self.growth), self.most), 3)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The inputs that a merge method needs.

    Attributes:
        name: the method's name.
        fisher: the kind of Fisher information: of mask "nodes", of all "parameters", or None.
        statistic: for "parameters": the stage of `fmn.fisher.stages` that computes it; its output
            has a value for each parameter.
        gram, base: whether it needs Gram matrices, and the base model.
        random: whether it draws random numbers, so that the result depends on the seed.
        density: default share of a task vector's entries that stay; None: all of them.
    """

    name: str
    fisher: Literal["nodes", "parameters"] | None = None
    statistic: str = "full-fisher"
    gram: bool = False
    base: bool = False
    random: bool = False
    density: float | None = None


@dataclass(frozen=True, kw_only=True)
class Method(Needs):
    """A merge method and its needs.

    Attributes:
        function: the function, with `arguments`.
        paper: its paper's number on arXiv, if there is one.
        element_wise: whether each entry of the result depends only on the same entry of the inputs,
            so that parameters can be merged in pieces. Such a function must pass on NaN and Inf in
            an expert or the base, as only its result is checked.
        auto: the values of settings that are "auto".
    """

    function: Callable[..., Tensor]
    arguments: tuple[str, ...]
    paper: str | None = None
    element_wise: bool = False
    auto: Tuning = field(default_factory=Tuning)

    def __call__(self, **inputs: Any) -> Tensor:
        """Merge one parameter: call the function with the inputs that are its arguments."""
        return self.function(**{name: inputs[name] for name in self.arguments})


METHODS: dict[str, Method] = {}
"""Every merge method by name."""

AUTO = Needs(name="auto", fisher="nodes", gram=True, random=True)
"""The inputs of `fmn.merge.auto`, which is not a method but tries several."""


def needs_of(name: str, has_fisher: bool = True, has_gram: bool = True) -> Needs:
    """The needs of a method; "auto" uses the statistics that are available."""
    if name != AUTO.name:
        return METHODS[name]
    return replace(AUTO, fisher="nodes" if has_fisher else None, gram=has_gram)


def method(name: str, **needs: Any) -> Callable[[_Function], _Function]:
    """Enter a function into `METHODS`; ``needs`` are attributes of `Method`."""

    def enter(function: _Function) -> _Function:
        arguments = tuple(signature(function).parameters)
        METHODS[name] = Method(name=name, function=function, arguments=arguments, **needs)
        return function

    return enter


@method("average", element_wise=True)
def average(experts: Tensors, coefficients: Coefficients) -> Tensor:
    """``sum_j lambda_j theta_j / sum_j lambda_j``."""
    from fmn.merge.rules import even, shares, weighted_mean

    return weighted_mean(experts, shares(even(len(experts)), coefficients))


# This tuning, and that of fisher-regmean, was chosen on rows of training splits: docs/results.md.
@method("mask-fisher", paper="2403.09891", fisher="nodes", element_wise=True,
        auto=Tuning("kind", growth=0.5))  # fmt: skip
def mask_fisher(experts: Tensors, coefficients: Coefficients, fisher: Tensors) -> Tensor:
    """``sum_j lambda_j F_j theta_j / sum_j lambda_j F_j``, F_j of the mask nodes (section 3)."""
    from fmn.merge.rules import shares, weighted_mean

    return weighted_mean(experts, shares(fisher, coefficients))


@method("fisher", paper="2111.09832", fisher="parameters", element_wise=True)
def full_fisher(experts: Tensors, coefficients: Coefficients, fisher: Tensors) -> Tensor:
    """``sum_j lambda_j F_j theta_j / sum_j lambda_j F_j``, F_j of each parameter (eq. 4)."""
    return mask_fisher(experts, coefficients, fisher)


@method("regmean", paper="2212.09849", gram=True)
def regmean(
    experts: Tensors, coefficients: Coefficients, grams: Tensors | None, damping: float
) -> Tensor:
    """Linear maps by regression on the experts' outputs (eq. 2); all else is averaged."""
    from fmn.merge.rules import even

    return fisher_regmean(experts, coefficients, even(len(experts)), grams, damping)


@method("fisher-regmean", paper="2212.09849", fisher="nodes", gram=True,
        auto=Tuning("site", growth=0.5, most=1.45))  # fmt: skip
def fisher_regmean(
    experts: Tensors,
    coefficients: Coefficients,
    fisher: Tensors,
    grams: Tensors | None,
    damping: float,
) -> Tensor:
    """RegMean whose output rows are weighed by the Fisher information of their mask nodes."""
    from fmn.merge.rules import damped, regress, row_weights

    if grams is None:
        return mask_fisher(experts, coefficients, fisher)
    moments = [damped(gram, damping) for gram in grams]
    return regress(experts, moments, row_weights(fisher, coefficients))


@method("wudi", paper="2503.08099", base=True)
def wudi(experts: Tensors, base: Tensor, coefficients: Coefficients, is_linear_map: bool) -> Tensor:
    """Linear maps whose task vector disturbs each expert's least; all else is averaged.

    The rows of a task vector span the inputs that it was trained on. The merged one minimises
    ``sum_j lambda_j |(tau - tau_j) tau_j^T|^2 / |tau_j|^2``. That is RegMean with the Gram matrices
    ``tau_j^T tau_j / |tau_j|^2``, and is solved exactly, where the paper descends a gradient.
    """
    from fmn.merge.rules import even

    return fisher_wudi(experts, base, coefficients, even(len(experts)), is_linear_map)


@method("fisher-wudi", paper="2503.08099", fisher="nodes", base=True, auto=Tuning("site"))
def fisher_wudi(
    experts: Tensors,
    base: Tensor,
    coefficients: Coefficients,
    fisher: Tensors,
    is_linear_map: bool,
) -> Tensor:
    """WUDI whose output rows are weighed by the Fisher information of their mask nodes."""
    from fmn.merge.rules import regress, row_weights, second_moment, task_vectors

    if not is_linear_map:
        return mask_fisher(experts, coefficients, fisher)
    vectors = task_vectors(experts, base)
    moments = [second_moment(vector) for vector in vectors]
    return base + regress(vectors, moments, row_weights(fisher, coefficients))


@method("task-arithmetic", paper="2212.04089", base=True, element_wise=True)
def task_arithmetic(experts: Tensors, base: Tensor, coefficients: Coefficients) -> Tensor:
    """``base + sum_j lambda_j tau_j`` with the task vectors tau_j (section 4)."""
    from fmn.merge.rules import task_vectors, weighted_sum

    return base + weighted_sum(task_vectors(experts, base), coefficients)


@method("ties", paper="2306.01708", base=True, density=0.2)
def ties(experts: Tensors, base: Tensor, coefficients: Coefficients, density: float) -> Tensor:
    """Trim small changes, elect a sign for each entry, average the changes of that sign."""
    from fmn.merge.rules import disjoint_mean, elect, task_vectors, trim

    vectors = [trim(vector, density) for vector in task_vectors(experts, base)]
    return base + disjoint_mean(vectors, elect(vectors, coefficients), coefficients)


@method("dare-ties", paper="2311.03099", base=True, random=True, density=0.5)
def dare_ties(
    experts: Tensors,
    base: Tensor,
    coefficients: Coefficients,
    density: float,
    generators: Sequence[Generator],
) -> Tensor:
    """Drop changes at random and rescale the others, then elect and average as TIES does."""
    from fmn.merge.rules import disjoint_mean, drop, elect, task_vectors

    pairs = zip(task_vectors(experts, base), generators, strict=True)
    vectors = [drop(vector, density, generator) for vector, generator in pairs]
    return base + disjoint_mean(vectors, elect(vectors, coefficients), coefficients)


@method("tsv-m", paper="2412.00081", base=True)
def tsv_m(experts: Tensors, base: Tensor, coefficients: Coefficients) -> Tensor:
    """The first 1/m of each task's singular vectors, made orthonormal together (algorithm 1).

    Parameters that are not matrices, or too small for one vector per task, are averaged.
    """
    import torch

    from fmn.merge.rules import leading_svd, nearest_orthonormal, strengths, task_vectors

    rank = min(base.shape, default=0) // len(experts)
    if base.ndim != 2 or rank == 0:
        return average(experts, coefficients)
    parts = [leading_svd(vector, rank) for vector in task_vectors(experts, base)]
    left = nearest_orthonormal(torch.cat([u for u, _, _ in parts], 1))
    right = nearest_orthonormal(torch.cat([vh for _, _, vh in parts]))
    scaled = [weight * s for weight, (_, s, _) in zip(strengths(coefficients), parts, strict=True)]
    return base + left * torch.cat(scaled) @ right


# Its tuning was chosen on training texts: docs/results.md.
@method("fisher-tsv-m", paper="2412.00081", fisher="nodes", base=True, auto=Tuning("kind", 0.25))
def fisher_tsv_m(
    experts: Tensors, base: Tensor, coefficients: Coefficients, fisher: Tensors
) -> Tensor:
    """TSV-M of task vectors whose entries are weighed by the Fisher information of all experts.

    So the rank goes to the mask nodes that matter; the merged task vector is unweighted again.
    """
    from fmn.merge.rules import importance, task_vectors

    weights, start = importance(fisher), base.double()
    weighted = [start + weights * vector for vector in task_vectors(experts, base)]
    return start + (tsv_m(weighted, start, coefficients) - start) / weights


@method("iso-c", paper="2502.04959", base=True)
def iso_c(experts: Tensors, base: Tensor, coefficients: Coefficients) -> Tensor:
    """The sum of the task matrices with each singular value replaced by their mean (eq. 4).

    Parameters that are not matrices are averaged.
    """
    from fmn.merge.rules import strengths, svd, task_vectors, weighted_sum

    if base.ndim != 2:
        return average(experts, coefficients)
    u, s, vh = svd(weighted_sum(task_vectors(experts, base), strengths(coefficients)))
    return base + s.sum() / min(base.shape) * u @ vh


def tuned(name: str, mapping: str, has_base: bool, normalise: str, exponent: float | str) -> Tuning:
    """A method's settings with every "auto" replaced.

    With the mapping "paper", and for mask-fisher without the base, "auto" is the paper's rule:
    no normalisation, exponent 1, no scale. Without the base the scale is always 1.
    """
    is_plain = mapping == "paper" or (name == "mask-fisher" and not has_base)
    auto = Tuning() if is_plain else METHODS[name].auto
    return auto._replace(
        normalise=auto.normalise if normalise == "auto" else normalise,
        exponent=auto.exponent if isinstance(exponent, str) else exponent,
        growth=auto.growth if has_base else 0.0,
    )
