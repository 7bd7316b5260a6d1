"""The declaration of what to watch, which users write, validated before any SQL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import WatcherError, near
from .events import model_identity, model_name

DEFAULT_OPERATIONS = ("inserted", "updated", "deleted")
OPERATIONS = (*DEFAULT_OPERATIONS, "truncated")
# A snapshot is the event of a row as a backfill finds it; no watcher has this operation.
EVENT_OPERATIONS = (*OPERATIONS, "snapshot")


@dataclass(frozen=True)
class Watcher:
    """One model and the operations on it that become events; made by :func:`watch`."""

    model: Any
    ops: tuple[str, ...] = DEFAULT_OPERATIONS
    columns: tuple[str, ...] = ()
    when: str | None = None
    extra: tuple[str, ...] = ()
    label: str | None = None
    replicated: bool = False

    def __str__(self) -> str:
        name = model_name(self.model)
        return f"{self.label!r} on {name}" if self.label is not None else name


def watch(
    model: Any,
    *ops: str,
    columns: Sequence[str] = (),
    when: str | None = None,
    extra: Sequence[str] = (),
    label: str | None = None,
    replicated: bool = False,
) -> Watcher:
    """Declare a watcher.

    ``ops`` are ``"inserted"``, ``"updated"``, ``"deleted"`` (the default: these three) and
    ``"truncated"``. ``columns`` narrows ``updated`` to rows in which one of them really differs.
    ``when`` is an SQL condition over ``NEW`` and ``OLD``. ``extra`` names columns whose values
    travel in the event. A ``label`` names the watcher: its events go to receivers of the label,
    not to those of the model. ``replicated`` also sees rows that a logical-replication
    subscription applies. Columns go by the model's attribute names.

    Raises WatcherError for a declaration that cannot be.
    """
    chosen = ops or DEFAULT_OPERATIONS
    who = f"The watcher of {model_name(model)}"
    for op in chosen:
        if op not in OPERATIONS:
            raise WatcherError(
                f"{who} has the unknown operation {op!r}{near(str(op), OPERATIONS)} "
                f"Operations are {_listed(OPERATIONS)}."
            )
    if len(set(chosen)) != len(chosen):
        raise WatcherError(f"{who} names an operation twice: {_listed(chosen)}.")
    for option, names in (("columns", columns), ("extra", extra)):
        listed = isinstance(names, Iterable) and not isinstance(names, str)
        if not listed or not all(isinstance(name, str) for name in names):
            raise WatcherError(
                f"{who} has {option}={names!r}: give a list of column names, such as "
                f"{option}=['status']."
            )
        if len(set(names)) != len(names):
            raise WatcherError(f"{who} names a column twice in {option}={list(names)!r}.")
    if columns and tuple(chosen) != ("updated",):
        raise WatcherError(
            f"{who} has columns={list(columns)!r} with {_listed(chosen)}: columns belong to "
            f"'updated' alone. Write watch({model_name(model)}, 'updated', columns=…), and a "
            "second watcher for the other operations."
        )
    if when is not None and (not isinstance(when, str) or not when.strip()):
        raise WatcherError(f"{who} has when={when!r}: give an SQL condition over NEW and OLD.")
    if "truncated" in chosen and (when is not None or extra) and len(chosen) == 1:
        raise WatcherError(
            f"{who} has when= or extra= with 'truncated', which has no row: drop them."
        )
    if label is not None and (not isinstance(label, str) or not label):
        raise WatcherError(f"{who} has label={label!r}: a label is a text that is not empty.")
    if not isinstance(replicated, bool):
        raise WatcherError(f"{who} has replicated={replicated!r}: give True or False.")
    return Watcher(model, tuple(chosen), tuple(columns), when, tuple(extra), label, replicated)


def normalize(watchers: Iterable[Any]) -> tuple[Watcher, ...]:
    """Return the watchers for what users write: watchers, bare models, ``(model, op, …)`` tuples.

    Raises WatcherError for duplicates: of a label, or of an unlabelled model and operation.
    """
    if isinstance(watchers, Mapping):
        raise WatcherError(
            f"watchers={watchers!r}: a mapping loses its values here; give a list of "
            "(model, operation) tuples."
        )
    if isinstance(watchers, str | Watcher) or not isinstance(watchers, Iterable):
        raise WatcherError(
            f"watchers={watchers!r}: give a list of models, (model, operation) tuples or "
            "pgsignals.watch(…)."
        )
    found: list[Watcher] = []
    for given in watchers:
        if isinstance(given, Watcher):
            found.append(given)
        elif isinstance(given, tuple):
            if not given or not all(isinstance(op, str) for op in given[1:]):
                raise WatcherError(
                    f"{given!r} is not a watcher: write (model, 'inserted', …), or "
                    "pgsignals.watch(model, …) for more than operations."
                )
            found.append(watch(*given))
        else:
            found.append(watch(given))
    labels: set[str] = set()
    pairs: set[tuple[int | str, str]] = set()
    for watcher in found:
        if watcher.label is not None:
            if watcher.label in labels:
                raise WatcherError(
                    f"Two watchers have the label {watcher.label!r}: labels are unique; rename one."
                )
            labels.add(watcher.label)
            continue
        for op in watcher.ops:
            pair = (model_identity(watcher.model), op)
            if pair in pairs:
                raise WatcherError(
                    f"Two watchers without a label deliver ({model_name(watcher.model)}, {op!r}): "
                    "give one of them a label, or join them."
                )
            pairs.add(pair)
    return tuple(found)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
