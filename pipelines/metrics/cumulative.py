"""Our figures as MONAI metrics: added up case by case, gathered over processes, averaged under the declared policy.

A :class:`CaseFigures` measures each case once, whatever the number of figures. Every mean stands beside the number of
cases it is the mean of, and beside the counts of what was missed, invented or empty. For MONAI it is a
``CumulativeIterationMetric``: usable alone, and as the ``metric_fn`` of ``IgniteMetricHandler``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric, Metric
from monai.utils import evenly_divisible_all_gather
from monai.utils.dist import get_dist_device

from pipelines.metrics.case_pairs import CasePair, pair_of_case
from pipelines.names import nearest
from transforms.errors import DataError, UsageError

Row = Mapping[str, Any]


class CaseFigures(CumulativeIterationMetric):
    """Figures of N cases for K labels (or regions, or classes).

    Called with ``y_pred`` and ``y``, a batch (B, C, *spatial) each or lists of B items (C, *spatial), as MONAI's
    metrics are. In a run on several processes every one may have another number of cases, also none; a case that a
    sampler gives to two of them counts twice.

    Args:
        names: of the K labels.
        figures: F names of figures.
        statuses: that a case can have for a label; all but the first are counted.
        spacing_mm: voxel size of cases that have no affine; see :func:`pipelines.metrics.case_pairs.pair_of_case`.
        key_figure: the one that :meth:`aggregate` returns; see there.
        prefix: stands before every key of :meth:`results`.
    """

    scopes: tuple[str, ...] = ("",)
    _synced: bool

    def __init__(
        self,
        names: Sequence[str],
        figures: Sequence[str],
        statuses: Sequence[str],
        spacing_mm: Sequence[float] | None,
        key_figure: str | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.names, self.figures, self.statuses = tuple(names), tuple(figures), tuple(statuses)
        self.spacing_mm, self.prefix = spacing_mm, prefix
        self.key_figure = key_figure
        if key_figure is not None:
            self.place_of(key_figure)

    @abstractmethod
    def _compare(self, pair: CasePair) -> tuple[Sequence[Row], tuple[torch.Tensor, ...]]:
        """Return one row per label with its status and figures, and what else is gathered, (rows, columns) each."""

    def aggregate(self) -> dict[str, float] | torch.Tensor:
        """Return :meth:`results`; with ``key_figure`` only that value, as a scalar tensor.

        ``IgniteMetricHandler`` writes every key of the first into ``engine.state.metrics``, and the second under its
        own name: a key metric of MONAI has to be a scalar. :class:`FigureOf` gives the other form from the same
        measurement. The name of a handler must not be a key of the results.

        Raises:
            DataError: no case since the last reset; with ``key_figure``, no case that has a value of it.
        """
        return self.results() if self.key_figure is None else self.value_of(self.key_figure)

    def get_buffer(self) -> torch.Tensor:
        """Return :meth:`table`, of the ``key_figure`` if there is one: what MONAI's ``MetricsSaver`` writes."""
        return self.table(self.key_figure)

    def results(self) -> dict[str, float]:
        """Return the means over all cases since the last reset, and what they are means of.

        For every figure and label ``<figure>_<label>``, the mean over the cases that have a value, NaN where none has,
        and ``n_<figure>_<label>``, their number; ``<figure>``, the mean over the labels that have a value; for every
        label ``n_<status>_<label>``; ``n_cases``.

        Raises:
            DataError: no case since the last reset.
        """
        values, statuses, *others = self._gathered()
        if not len(values):
            raise DataError(
                f"{type(self).__name__}: no case was measured",
                "0 since the last reset, at least 1 expected",
                "call the metric, or attach its own handler, before asking for results",
            )
        results = _means(values, self.figures, self.names) | {"n_cases": len(values)}
        for column, name in enumerate(self.names):
            counts = torch.bincount(statuses[:, column], minlength=len(self.statuses)).tolist()
            results |= {f"n_{self.statuses[i]}_{name}": counts[i] for i in range(1, len(counts))}
        results |= self._pooled(*others)
        return {f"{self.prefix}{key}": value for key, value in results.items()}

    def value_of(self, key: str) -> torch.Tensor:
        """Return one value of :meth:`results`, (), float64; ``key`` without the prefix.

        Raises:
            UsageError: no such figure.
            DataError: it has no value, so that nothing can be chosen by it.
        """
        self.place_of(key)
        results = self.results()
        value = results[f"{self.prefix}{key}"]
        if math.isnan(value):
            raise DataError(
                f"{type(self).__name__}: {key} has no value",
                f"none of {results[f'{self.prefix}n_cases']} cases has one",
                "measure at least one case in which the label occurs",
            )
        return torch.tensor(value, dtype=torch.float64)

    def table(self, key: str | None = None) -> torch.Tensor:
        """Return the values case by case, float64, NaN where a case has none.

        Of one figure (N, K), of one figure and label (N, 1), of all (N, K F): the figures of the first label first.
        """
        values = self._gathered()[0]
        if key is None:
            return values.flatten(1)
        figure, labels = self.place_of(key)
        return values[:, labels, figure]

    def place_of(self, key: str) -> tuple[int, slice]:
        """Return the figure and the labels that a key of :meth:`results` speaks of.

        Raises:
            UsageError: no such figure.
        """
        places: dict[str, tuple[int, slice]] = {}
        for scope in self.scopes:
            for i, figure in enumerate(self.figures):
                places[f"{scope}{figure}"] = i, slice(None)
                places |= {f"{scope}{figure}_{name}": (i, slice(k, k + 1)) for k, name in enumerate(self.names)}
        if key not in places:
            raise UsageError(
                f"{type(self).__name__}: figure {key!r}", "it is not among the results", nearest(key, list(places))
            )
        return places[key]

    def _pooled(self, *gathered: torch.Tensor) -> dict[str, float]:
        """Return results that are not means over cases, from what else was gathered."""
        return {}

    def _compute_tensor(self, y_pred: Any, y: Any = None, **kwargs: Any) -> list[torch.Tensor]:
        return self._compute_list(y_pred, y)

    def _compute_list(self, y_pred: Any, y: Any = None, **kwargs: Any) -> list[torch.Tensor]:
        if y is None or len(y_pred) != len(y) or not len(y):
            raise DataError(
                f"{type(self).__name__}: the batch cannot be compared",
                f"{len(y_pred)} predictions and {'no' if y is None else len(y)} references; expected as many of both",
                "give y_pred and y of the same cases",
            )
        # By index: only so does a MetaTensor hand over the affine of each item.
        cases = [self._measure(pair_of_case(y_pred[i], y[i], self.spacing_mm)) for i in range(len(y))]
        return [torch.cat(parts) for parts in zip(*cases, strict=True)]

    def _measure(self, pair: CasePair) -> tuple[torch.Tensor, ...]:
        """Return values (1, K, F), statuses (1, K) and the rest."""
        rows, others = self._compare(pair)
        values = [[_number(row, figure, pair.case) for figure in self.figures] for row in rows]
        statuses = [self.statuses.index(row["status"]) for row in rows]
        return torch.tensor([values], dtype=torch.float64), torch.tensor([statuses]), *others

    def _empty_buffers(self) -> list[torch.Tensor]:
        shape = 0, len(self.names)
        return [torch.empty(*shape, len(self.figures), dtype=torch.float64), torch.empty(shape, dtype=torch.int64)]

    def _gathered(self) -> list[torch.Tensor]:
        self._sync()
        return [part for part in self._synced_tensors or () if part is not None]

    def _sync(self) -> None:
        # MONAI's own leaves early on a process without cases, and all others wait for it for ever.
        if self._synced:
            return
        local = [torch.stack(rows) for rows in self._buffers] if self._buffers else self._empty_buffers()
        device = get_dist_device()
        self._synced_tensors = [evenly_divisible_all_gather(part.to(device)).cpu() for part in local]
        self._synced = True


class FigureOf(Metric):
    """One figure, or all of them, of a :class:`CaseFigures` that another handler already feeds; measures nothing.

    In a configuration the first handler has ``metric_fn: "@figures"``, and any number of further ones::

        metric_fn: {_target_: pipelines.metrics.FigureOf, metric: "@figures", figure: hd95_mm}

    Args:
        metric: the one that measures; it has to have a handler of its own.
        figure: a key of its results without the prefix; None: all results.
    """

    def __init__(self, metric: CaseFigures, figure: str | None = None) -> None:
        if figure is not None:
            metric.place_of(figure)
        self.metric, self.figure = metric, figure

    def __call__(self, y_pred: Any, y: Any = None) -> None:
        """Do nothing: the metric has a handler of its own."""

    def reset(self) -> None:
        """Do nothing, for the same reason."""

    def aggregate(self) -> dict[str, float] | torch.Tensor:
        """Return the results, or the value of the figure as a scalar tensor; errors as :class:`CaseFigures`."""
        return self.metric.results() if self.figure is None else self.metric.value_of(self.figure)

    def get_buffer(self) -> torch.Tensor:
        """Return the figure case by case; see :meth:`CaseFigures.table`."""
        return self.metric.table(self.figure)


def mean_of_present(values: torch.Tensor) -> float:
    """Return the mean of the values that are not NaN, NaN where all are."""
    return float(values[~values.isnan()].mean())


def _means(values: torch.Tensor, figures: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Return mean and number of values for every figure and label, and the mean over labels, of (N, K, F)."""
    means: dict[str, float] = {}
    for i, figure in enumerate(figures):
        of_label = [mean_of_present(values[:, k, i]) for k in range(len(names))]
        means[figure] = mean_of_present(torch.tensor(of_label, dtype=torch.float64))
        for k, name in enumerate(names):
            means[f"{figure}_{name}"] = of_label[k]
            means[f"n_{figure}_{name}"] = int((~values[:, k, i].isnan()).sum())
    return means


def _number(row: Row, figure: str, case: str) -> float:
    """Return a figure, NaN for None: no value. A NaN of its own is an error, not a case to leave out."""
    value = row[figure]
    if value is not None and not math.isfinite(value):
        raise DataError(
            f"case {case}: {figure} is {value}",
            "a finite number is expected, or no value",
            "look at this case's images",
        )
    return math.nan if value is None else float(value)
