"""Labels: names for the indices of tensor axes, and which of them must leave together.

Every index of every axis carries a label. A label is an *atom*, or *composite*: an index that stands for several atoms
at once (index h * D + d of an axis of heads x features stands for head h and for feature d) leaves when one of them
does. Label 0 never leaves. Whatever must leave together is unified; where two composites cannot be matched, the coarser
parts are locked, so that an answer is never wrong, only smaller.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["DIM", "HEADS", "INNER", "OUTER", "Ids", "Labels"]

Ids = npt.NDArray[np.int64]

_ARRAYS = ("_parent", "_left", "_right", "_lock", "_marks", "_block")

OUTER, INNER, HEADS, DIM = 1, 2, 4, 8
"""Marks of atoms: a block of a split axis, the same place in every block, a head of attention, a feature of heads."""


class Labels:
    """A union-find over labels, vectorised: every method takes and returns arrays of label ids.

    Example:
        >>> labels = Labels()
        >>> flat = labels.fresh(6)                       # an axis of six
        >>> heads, dims = labels.split(flat.reshape(2, 3), "view")   # seen as 2 heads of 3
        >>> labels.factors(flat[:2]).tolist() == [[heads[0], dims[0]], [heads[0], dims[1]]]
        True
    """

    def __init__(self) -> None:
        self._count = 1
        self._parent = np.zeros(1024, np.int64)
        self._left = np.zeros(1024, np.int64)  # of a composite root; 0: an atom
        self._right = np.zeros(1024, np.int64)
        self._lock = np.zeros(1024, np.int32)  # of a root: 1 + the number of its reason; 0: free
        self._marks = np.zeros(1024, np.int32)
        self._block = np.zeros(1024, np.int64)
        self._blocks = 0
        self._reasons = ["never leaves"]
        self._reason_ids = {"never leaves": 0}
        self._lock[0] = 1

    def __len__(self) -> int:
        return self._count

    def copy(self) -> Labels:
        """Return labels of their own life: what is locked or unified there is not here."""
        other = copy.copy(self)
        for name in _ARRAYS:
            setattr(other, name, getattr(self, name).copy())
        other._reasons, other._reason_ids = list(self._reasons), dict(self._reason_ids)
        return other

    def fresh(self, count: int, mark: int = 0) -> Ids:
        """Return new atoms, shape (count,); together they are a block."""
        ids = self._allocate(count)
        self._blocks += 1
        self._block[ids] = self._blocks
        self._marks[ids] = mark
        return ids

    def find(self, ids: Ids) -> Ids:
        """Return the representative of each label."""
        roots = self._parent[ids]
        while True:
            higher = self._parent[roots]
            if np.array_equal(higher, roots):
                break
            roots = higher
        self._parent[ids] = roots
        return roots

    def factors(self, ids: Ids, *, with_locked: bool = False) -> Ids:
        """Return the atoms that each label stands for, shape (n, k), 0 where there are fewer than k.

        Args:
            ids: labels, shape (n,).
            with_locked: also those that never leave.
        """
        columns = [self.find(ids)]
        index = 0
        while index < len(columns):
            column = columns[index]
            left = self._left[column]
            composite = left > 0
            if composite.any():
                columns[index] = self.find(np.where(composite, left, column))
                columns.insert(index + 1, self.find(np.where(composite, self._right[column], 0)))
            else:
                index += 1
        if not with_locked:
            columns = [np.where(self._lock[column] > 0, 0, column) for column in columns]
        columns = [column for column in columns if column.any()] or [np.zeros_like(ids)]
        return np.stack(columns, axis=1)

    def reason(self, root: int) -> str | None:
        """Return why an atom never leaves, or None when it may."""
        number = int(self._lock[root])
        return self._reasons[number - 1] if number else None

    def marks(self, roots: Ids) -> Ids:
        """Return the marks of atoms, as a sum."""
        return self._marks[roots].astype(np.int64)

    def blocks(self, roots: Ids) -> Ids:
        """Return the number of the block that each atom was made in."""
        return self._block[roots]

    def mark(self, ids: Ids, mark: int) -> None:
        """Mark every atom of the labels."""
        self._marks[self.factors(ids.ravel())] |= mark

    def lock(self, ids: Ids, reason: str) -> None:
        """Say of labels that they never leave, and why; the first reason stays."""
        roots = np.unique(self.factors(ids.ravel()))
        if not roots.any():
            return
        number = self._reason_ids.setdefault(reason, len(self._reasons))
        if number == len(self._reasons):
            self._reasons.append(reason)
        self._lock[roots[roots > 0]] = number + 1

    def compose(self, columns: Sequence[Ids]) -> Ids:
        """Return labels that leave when any of the given ones does (arrays that broadcast)."""
        result = np.zeros((), np.int64)
        for column in columns:
            result, column = np.broadcast_arrays(result, column)
            both = (result != 0) & (column != 0) & (result != column)
            merged = np.where(result != 0, result, column)
            if both.any():
                pairs, inverse = np.unique(np.stack([result[both], column[both]], 1), axis=0, return_inverse=True)
                ids = self._allocate(len(pairs))
                self._left[ids], self._right[ids] = pairs[:, 0], pairs[:, 1]
                merged[both] = ids[inverse.ravel()]
            result = merged
        return np.ascontiguousarray(result)

    def unify(self, left: Ids, right: Ids, reason: str) -> None:
        """Say of two arrays of labels that they leave together, element by element.

        Args:
            left: labels.
            right: labels, same shape.
            reason: why those of one never leave, when those of the other do not.
        """
        pairs = np.stack([self.find(left.ravel()), self.find(right.ravel())], 1)
        while True:
            pairs = self.find(pairs[pairs[:, 0] != pairs[:, 1]].ravel()).reshape(-1, 2)
            pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
            if not len(pairs):
                return
            a, b = _packed(self.factors(pairs[:, 0])), _packed(self.factors(pairs[:, 1]))
            counts = np.stack([(a > 0).sum(1), (b > 0).sum(1)], 1)
            # one case a round: what it changes, the others must see
            pairs = pairs[self._unify_round(pairs, a, b, counts, reason)]

    def split(self, ids: Ids, reason: str) -> list[Ids]:
        """See one axis of labels as several: an index leaves when its place on one of the axes does.

        Args:
            ids: labels, shape (n1, n2, ...).
            reason: see `unify`.

        Returns:
            The labels of each axis, shapes (n1,), (n2,), ...
        """
        if ids.ndim == 1:
            return [ids]
        first = ids.shape[0]
        outer: list[Ids] = []
        inner: list[Ids] = []
        for column in self.factors(ids.ravel()).T:
            table = column.reshape(first, -1)
            if (table == table[:, :1]).all():
                outer.append(table[:, 0])
            elif (table == table[:1]).all():
                inner.append(table[0])
            else:
                one, other = self._product(table, reason)
                outer.append(one)
                inner.append(other)
        rest = self.compose([np.zeros(ids[0].size, np.int64), *inner]).reshape(ids.shape[1:])
        return [self.compose([np.zeros(first, np.int64), *outer]), *self.split(rest, reason)]

    def _product(self, table: Ids, reason: str) -> tuple[Ids, Ids]:
        """Make the atoms of rows and of columns that a table of labels is the product of."""
        _, row = np.unique(table, axis=0, return_inverse=True)
        _, column = np.unique(table, axis=1, return_inverse=True)
        row, column = _in_order(row.ravel()), _in_order(column.ravel())
        outer = self.fresh(int(row.max()) + 1, OUTER)[row]
        inner = self.fresh(int(column.max()) + 1, INNER)[column]
        self.unify(table, self.compose([outer[:, None], inner[None, :]]), reason)
        return outer, inner

    def _unify_round(self, pairs: Ids, a: Ids, b: Ids, counts: Ids, reason: str) -> npt.NDArray[np.bool_]:
        """Handle the pairs of one case; return which pairs must be looked at again."""
        fixed = (counts == 0).any(1)
        if fixed.any():
            for side in (a, b):
                self.lock(side[fixed], reason)
            return ~fixed
        single = (counts == 1).all(1)
        if single.any():
            self._union(a[single, 0], b[single, 0])
            return ~single | (a[:, 0] != b[:, 0])
        for mine, other, own, place in ((a, b, counts[:, 0], 1), (b, a, counts[:, 1], 0)):
            defined = own == 1
            if defined.any():
                again = np.ones(len(pairs), bool)
                again[defined] = self._define(mine[defined, 0], other[defined], pairs[defined, place], reason)
                return again
        alike = (counts == counts[0]).all(1)
        self._match(a[alike, : counts[0, 0]], b[alike, : counts[0, 1]], reason)
        return ~alike

    def _union(self, a: Ids, b: Ids) -> None:
        low, high = np.minimum(a, b), np.maximum(a, b)
        self._parent[high] = low  # of several entries for one label the last counts; the caller looks again
        np.bitwise_or.at(self._marks, self.find(low), self._marks[high])

    def _define(self, atoms: Ids, factors: Ids, composites: Ids, reason: str) -> npt.NDArray[np.bool_]:
        """Make atoms composite; one that is part of its own definition keeps the others from leaving."""
        inside = (factors == atoms[:, None]).any(1)
        if inside.any():
            self.lock(np.where(factors == atoms[:, None], 0, factors)[inside], reason)
            return ~inside  # what is locked now may be among the others
        free = np.unique(atoms, return_index=True)[1]
        for column in factors[free].T:  # what was known of the atom is now known of what it stands for
            np.bitwise_or.at(self._marks, column, self._marks[atoms[free]] & (HEADS | DIM))
        if np.isin(atoms[free], factors[free]).any():  # a definition may use what is defined here: one at a time
            for row in free:
                if not (self.factors(composites[row : row + 1]) == atoms[row]).any():
                    self._parent[atoms[row]] = self.find(composites[row : row + 1])[0]
        else:
            self._parent[atoms[free]] = composites[free]
        return np.ones(len(atoms), bool)

    def _match(self, a: Ids, b: Ids, reason: str) -> None:
        """Unify composites factor by factor; what has no counterpart of the same fineness is locked."""
        mine, theirs = list(a.T), list(b.T)
        for column in list(mine):
            twin = next((other for other in theirs if np.array_equal(column, other)), None)
            twin = next((o for o in theirs if _one_to_one(column, o)), None) if twin is None else twin
            if twin is not None:
                mine = [c for c in mine if c is not column]
                theirs = [c for c in theirs if c is not twin]
                self.unify(column, twin, reason)
        finest = [max(side, key=lambda c: len(np.unique(c)), default=None) for side in (mine, theirs)]
        one, other = finest
        for column in (*mine, *theirs):
            if one is None or other is None or (column is not one and column is not other):
                self.lock(column, reason)
        if one is not None and other is not None:
            self.unify(one, other, reason)

    def _allocate(self, count: int) -> Ids:
        start, self._count = self._count, self._count + count
        while self._count > len(self._parent):
            for name in _ARRAYS:
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        ids = np.arange(start, self._count, dtype=np.int64)
        self._parent[ids] = ids
        return ids


def _packed(factors: Ids) -> Ids:
    """Move the zeros of every row behind the others, which keep their order."""
    if factors.shape[1] == 1 or (factors > 0).all():
        return factors
    order = np.argsort(factors == 0, axis=1, kind="stable")
    return np.take_along_axis(factors, order, 1)


def _one_to_one(a: Ids, b: Ids) -> bool:
    pairs = len(np.unique(np.stack([a, b], 1), axis=0))
    return pairs == len(np.unique(a)) == len(np.unique(b))


def _in_order(classes: Ids) -> Ids:
    """Renumber classes by where they are first seen."""
    _, first, inverse = np.unique(classes, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse.ravel()]
