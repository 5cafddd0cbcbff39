"""Labels are sound: whatever atoms leave, everything that was said of the labels holds."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.graph.labels import HEADS, OUTER, Ids, Labels

STEPS = st.lists(st.tuples(st.sampled_from("fusplmc"), st.integers(0, 99), st.integers(0, 99)), max_size=25)
SHAPES = ((2, 6), (3, 4), (4, 3), (6, 2))


class Told:
    """Everything that was said of arrays of twelve labels, to be checked for any removal."""

    def __init__(self) -> None:
        self.labels = Labels()
        self.arrays: list[Ids] = [self.labels.fresh(12)]
        self.same: list[tuple[Ids, Ids]] = []
        self.split: list[tuple[Ids, Ids, Ids]] = []
        self.locked: list[Ids] = []

    def pick(self, number: int) -> Ids:
        return self.arrays[number % len(self.arrays)]

    def do(self, step: tuple[str, int, int]) -> None:
        kind, one, two = step
        first, second = self.pick(one), self.pick(two)
        if kind == "f":
            self.arrays.append(self.labels.fresh(12))
        elif kind == "u":
            self.labels.unify(first, second, "unified")
            self.same.append((first, second))
        elif kind == "s":
            shape = SHAPES[two % len(SHAPES)]
            outer, inner = self.labels.split(first.reshape(shape), "split")
            self.split.append((first.reshape(shape), outer, inner))
            self.arrays += [np.tile(outer, 12 // len(outer)), np.repeat(inner, 12 // len(inner))]
        elif kind == "p":
            self.arrays.append(np.random.default_rng(two).permutation(first))
        elif kind == "l":
            self.labels.lock(first[: two % 3], "locked")
            self.locked.append(first[: two % 3])
        elif kind == "m":
            merged = self.labels.compose([first, second])
            for part in (first, second):  # what leaves alone leaves together
                self.arrays.append(merged)
                assert self.gone_if(part, merged)
        elif kind == "c":
            self.arrays.append(np.concatenate([first[:6], second[6:]]))

    def gone_if(self, part: Ids, merged: Ids) -> bool:
        return all(self.gone(merged, r)[i] for r in self.removals() for i in np.flatnonzero(self.gone(part, r)))

    def removals(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return [rng.random(len(self.labels)) < share for share in (0.05, 0.2, 0.5)]

    def gone(self, ids: Ids, removed: np.ndarray) -> np.ndarray:
        removed = removed.copy()
        removed[0] = False
        return removed[self.labels.factors(ids.ravel())].any(1).reshape(ids.shape)

    def check(self) -> None:
        for removed in self.removals():
            for one, other in self.same:
                assert (self.gone(one, removed) == self.gone(other, removed)).all()
            for table, outer, inner in self.split:
                expected = self.gone(outer, removed)[:, None] | self.gone(inner, removed)[None, :]
                assert (self.gone(table, removed) == expected).all()
            for ids in self.locked:
                assert not self.gone(ids, removed).any()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(steps=STEPS)
def test_every_removal_keeps_what_was_said(steps: list[tuple[str, int, int]]) -> None:
    told = Told()
    for step in steps:
        told.do(step)
    told.check()


def test_heads_and_features_can_leave_by_themselves() -> None:
    labels = Labels()
    queries, keys, values = labels.fresh(12), labels.fresh(12), labels.fresh(12)
    seen = [labels.split(ids.reshape(3, 4), "view") for ids in (queries, keys, values)]
    for heads, _ in seen[1:]:
        labels.unify(seen[0][0], heads, "attention")
    labels.unify(seen[0][1], seen[1][1], "scores")
    joined = labels.compose([seen[0][0][:, None], seen[2][1][None, :]]).ravel()
    out = labels.fresh(12)
    labels.unify(out, joined, "linear")
    assert [len(np.unique(column)) for column in labels.factors(out).T] == [3, 4]
    assert (labels.find(seen[0][0]) == labels.find(seen[2][0])).all()  # the same heads
    assert not np.isin(labels.find(seen[2][1]), labels.find(seen[0][1])).any()  # values have features of their own
    labels.mark(out[:4], HEADS)
    assert (labels.marks(labels.find(seen[1][0]))[:1] == OUTER | HEADS).all()


def test_groups_of_query_heads_under_gqa() -> None:
    labels = Labels()
    flat = labels.fresh(8)
    heads, _ = labels.split(flat.reshape(4, 2), "view")
    keys = labels.fresh(2)
    labels.unify(heads, np.repeat(keys, 2), "repeat_kv")
    assert len(np.unique(labels.factors(heads))) == 2 and (labels.find(heads)[::2] == labels.find(keys)).all()


def test_what_cannot_be_matched_is_locked_not_guessed() -> None:
    labels = Labels()
    flat = labels.fresh(12)
    labels.split(flat.reshape(3, 4), "three blocks")
    labels.split(flat.reshape(4, 3), "four blocks")
    removed = np.ones(len(labels), bool)
    removed[0] = False
    gone = removed[labels.factors(flat)].any(1)
    assert gone.all() or not gone.any() or len(np.unique(labels.factors(flat))) > 1
    reasons = {labels.reason(int(root)) for root in labels.factors(flat, with_locked=True).ravel() if root}
    assert reasons <= {None, "three blocks", "four blocks"}


def test_a_label_that_is_part_of_itself_keeps_the_rest() -> None:
    labels = Labels()
    one, other = labels.fresh(3), labels.fresh(3)
    labels.unify(one, labels.compose([one, other]), "itself")
    assert not labels.factors(other).any() and labels.factors(one).all()
    assert labels.reason(int(labels.find(other)[0])) == "itself" and labels.reason(int(labels.find(one)[0])) is None


def test_the_first_reason_stays() -> None:
    labels = Labels()
    ids = labels.fresh(2)
    labels.lock(ids[:1], "first")
    labels.lock(ids, "second")
    assert [labels.reason(int(root)) for root in ids] == ["first", "second"]
