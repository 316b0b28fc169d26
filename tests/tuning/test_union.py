"""A union does not care for order, grouping and repetition; versions are versions."""

from hypothesis import given
from hypothesis import strategies as st

from tests.tuning.cases import BMM, DEFAULT, GROUPED, HERE, PADDED, SOFTWARE, candidate, key, on, record
from tutelx.tuning.parse import to_line
from tutelx.tuning.union import staleness, union

CANDIDATES = st.builds(
    candidate,
    st.sampled_from([BMM, GROUPED, PADDED]),
    st.sampled_from([0.5, 1.5]),
    n=st.sampled_from([3, 9]),
    status=st.sampled_from(["ok", "slow", "wrong"]),
    error=st.sampled_from([None, 0.0, 0.5]),
)
RECORDS = st.builds(
    lambda candidates, at, software, units, alias, date: record(
        *candidates,
        at=at,
        software={**SOFTWARE, "torch": software},
        hardware=on(HERE, units=units, aliases={"cpu": alias}),
        provenance={"date": date},
    ),
    st.lists(CANDIDATES, max_size=3, unique_by=lambda c: c.plan),
    st.sampled_from([key(), key(tokens=64)]),
    st.sampled_from(["2.9", "2.13"]),
    st.sampled_from([2, 4]),
    st.sampled_from(["a", "b"]),
    st.sampled_from(["2026-01-01", "2026-02-01"]),
)


def lines(records):
    return [to_line(each) for each in records]


@given(st.lists(RECORDS, max_size=6), st.integers(0, 6), st.randoms(use_true_random=False))
def test_commutative_associative_idempotent(records, cut, random):
    whole = union(records)
    shuffled = list(records)
    random.shuffle(shuffled)
    assert lines(union(shuffled)) == lines(whole)
    assert lines(union([*union(records[:cut]), *union(records[cut:])])) == lines(whole)
    assert lines(union([*whole, *whole, *records])) == lines(whole)
    # Nothing that was measured is lost.
    assert {(r.key, r.software["torch"], r.hardware, c.plan) for r in whole for c in r.candidates} == {
        (r.key, r.software["torch"], r.hardware, c.plan) for r in records for c in r.candidates
    }


def test_more_turns_win():
    few, many = candidate(BMM, 0.5, n=3), candidate(BMM, 0.9, n=30)
    [joined] = union([record(few, candidate(GROUPED, 0.7)), record(many)])
    assert joined.by_plan[BMM] == many
    assert set(joined.by_plan) == {DEFAULT, BMM, GROUPED}


def test_wrong_stays_wrong():
    [joined] = union([record(candidate(BMM, 0.5, n=30)), record(candidate(BMM, 0.5, n=3, status="wrong"))])
    assert joined.by_plan[BMM].status == "wrong"


def test_other_software_other_defaults_and_other_machines_stay_apart():
    records = [
        record(),
        record(software={"torch": "2.9"}),
        record(candidate(DEFAULT, 1.0), default=BMM),
        record(hardware=on(HERE, memory_rate=11.0)),
    ]
    assert len(union(records)) == 4


def test_versions_are_compared_as_versions():
    def stale(then, now):
        return staleness(record(software={"torch": then}), {"torch": now})

    assert stale("2.13.0+cpu", "2.13+cu130") == ()
    assert stale("2.9.0", "2.10.0") == ("torch 2.9.0, not 2.10.0",)
    assert stale("nightly", "nightly") == ()
    assert stale("nightly", "2.10.0") == ("torch nightly, not 2.10.0",)
    assert staleness(record(software={"tutelx": "0.1"}), {"torch": "2.10"}) == ()
