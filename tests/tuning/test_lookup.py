"""Tiers in their order, interpolation by hand, and what is never answered."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tuning.cases import BMM, DEFAULT, GROUPED, HERE, PADDED, SOFTWARE, candidate, key, on, record, workload
from tutelx.errors import InvalidValueError
from tutelx.planner import RulePlanner
from tutelx.tuning.cost import Cost
from tutelx.tuning.lookup import Lookup
from tutelx.tuning.records import StoredPlan
from tutelx.tuning.store import Database
from tutelx.tuning.tiles import of_rules
from tutelx.types import Plan

RULES = RulePlanner()


def look_up(*records, hardware=HERE, model=None, software=SOFTWARE):
    return Lookup(Database(records=records), hardware, model, software=software)


def ask(lookup, at, **change):
    asked = workload(at, **change)
    return lookup.find(at, asked, RULES.plan(asked))


def stored(answer):
    return StoredPlan.of(answer.plan, answer.plan)


class Model:
    """Seconds by layout."""

    def __init__(self, **seconds):
        self.seconds = seconds

    def predict(self, workload, plan):
        return Cost(total=self.seconds[plan.layout], compute=0.0, exchange=0.0, weights=0.0, memory=0.0)


def test_exact():
    answer = ask(look_up(record(candidate(BMM, 0.5, 2.0), candidate(GROUPED, 0.8, 2.0), seconds=2.0)), key())
    assert (stored(answer), answer.tier, answer.distance) == (BMM, "exact", 0.0)
    assert answer.predicted == answer.measured == pytest.approx(1.0)
    assert [(c.plan, c.verdict) for c in answer.considered] == [
        (BMM, ""),
        (GROUPED, "another takes less"),
        (DEFAULT, "the default"),
    ]


def test_the_default_stays_where_nothing_beats_it_beyond_the_spread():
    unsure = candidate(BMM, 0.95, spread=0.06)
    answer = ask(look_up(record(unsure)), key())
    assert (stored(answer), answer.tier) == (DEFAULT, "exact")
    assert answer.predicted == pytest.approx(1.0)
    assert [c.verdict for c in answer.considered] == ["gains too little to be sure", ""]
    assert stored(ask(look_up(record(replace(unsure, spread=0.04))), key())) == BMM


def test_a_wrong_candidate_is_never_chosen():
    fast = candidate(BMM, 0.1, status="wrong", error=0.5)
    assert stored(ask(look_up(record(fast)), key())) == DEFAULT
    # Not near it either, nor where another key found it right.
    around = (record(fast), record(candidate(BMM, 0.1), at=key(tokens=4096)))
    for tokens in (512, 2048, 4096 * 2):
        assert stored(ask(look_up(*around), key(tokens=tokens))) == DEFAULT


def test_what_cannot_run_is_never_answered():
    chunks = StoredPlan(layout="ragged", expert_kernel="tiled", pipeline_degree=2)
    gathered = StoredPlan(layout="ragged", expert_kernel="tiled", shard_degree=0)
    huge = StoredPlan(layout="ragged", expert_kernel="tiled", tile_rows=2**30, tile_columns=1)
    impossible = [candidate(plan, 0.1) for plan in (chunks, gathered, huge)]
    lookup = look_up(record(candidate(BMM, 0.5), candidate(PADDED, 0.6), *impossible))
    assert stored(ask(lookup, key())) == BMM
    assert stored(ask(lookup, key(), expert_kernels=("tiled",))) == PADDED
    assert stored(ask(lookup, key(), layouts=("ragged",))) == DEFAULT


def test_tiles_of_the_rules_are_those_for_the_workload_at_hand():
    lookup = look_up(record(candidate(PADDED, 0.5)))
    for demand in (256, 2000):
        at = key(load_factor=1.0)
        asked = workload(at, demand=demand)
        rule = RULES.plan(asked)
        plan = lookup.find(at, asked, rule).plan
        assert plan == replace(rule.plan, layout="padded")


def test_between_two_keys_logarithms_are_interpolated():
    # At 256 tokens BMM takes 1/4 of the default's time, at 4096 tokens 4 times. One octave from 256, three from 4096:
    # log2 of the ratio is -2 + 1/4 * 4 = -1. In the middle it is 0, beyond it the default is better.
    lookup = look_up(
        record(candidate(BMM, 0.25, 1.0), at=key(tokens=256), seconds=1.0),
        record(candidate(BMM, 4.0, 16.0), at=key(tokens=4096), seconds=16.0),
    )
    answer = ask(lookup, key(tokens=512))
    assert (stored(answer), answer.tier, answer.distance) == (BMM, "nearest", 1.0)
    assert {c.plan: c.ratio for c in answer.considered}[BMM] == pytest.approx(0.5)
    # The default's seconds double with the tokens: 2 at 512; BMM's grow from 0.25 to 64 in four octaves: 1 at 512.
    assert answer.predicted == pytest.approx(1.0)
    assert {c.plan: c.predicted for c in answer.considered}[DEFAULT] == pytest.approx(2.0)
    for tokens in (1024, 2048):
        answer = ask(lookup, key(tokens=tokens))
        assert (stored(answer), answer.tier) == (DEFAULT, "nearest")
    # Nearer to 4096, but what lies there does not decide alone.
    assert stored(ask(lookup, key(tokens=896))) == BMM


def test_on_a_grid_the_corners_weigh_bilinearly():
    ratios = {(256, 1): 0.5, (256, 4): 0.25, (1024, 1): 1.0, (1024, 4): 0.5}
    grid = [record(candidate(BMM, r), at=key(tokens=t, top_k=k)) for (t, k), r in ratios.items()]
    far = record(candidate(BMM, 64.0), at=key(tokens=4096, top_k=4))  # lies behind a corner
    answer = ask(look_up(*grid, far), key(tokens=512, top_k=2))
    # log2: -1, -2, 0, -1 with a quarter each: -1.
    assert {c.plan: c.ratio for c in answer.considered}[BMM] == pytest.approx(0.5)


def test_where_a_plan_was_not_timed_it_was_not_worth_it():
    lookup = look_up(record(candidate(BMM, 0.25), at=key(tokens=256)), record(at=key(tokens=1024)))
    answer = ask(lookup, key(tokens=512))
    assert {c.plan: c.ratio for c in answer.considered}[BMM] == pytest.approx((0.25 * 1.5) ** 0.5)


def test_a_key_that_timed_neither_plan_tells_nothing_of_them():
    # GROUPED is all that was timed at 4096: what 256 says of BMM and of the default holds as far as it is heard.
    lookup = look_up(record(candidate(BMM, 0.5), at=key(tokens=256)), record(at=key(tokens=4096), default=GROUPED))
    for tokens in (320, 1024):
        assert stored(ask(lookup, key(tokens=tokens))) == BMM


def test_a_default_that_was_not_timed_is_not_left_for_what_was():
    # The rules change from the ragged to the padded layout; ragged is not timed beyond, padded not before.
    ragged, padded = RULES.plan(workload()).plan, replace(RULES.plan(workload()).plan, layout="padded")
    lookup = look_up(
        record(candidate(BMM, 0.5), at=key(tokens=256)),
        record(candidate(GROUPED, 1.1), at=key(tokens=4096), default=PADDED),
    )
    asked = workload(key(tokens=1024))
    assert lookup.find(key(tokens=1024), asked, padded).plan == padded
    assert stored(lookup.find(key(tokens=320), workload(key(tokens=320)), ragged)) == BMM


class Links:
    """Rows take time, gathered weights take as long for any tokens."""

    def predict(self, workload, plan):
        total = 7.0 if plan.shard_degree == 0 else workload.tokens / 100
        return Cost(total=total, compute=0.0, exchange=0.0, weights=0.0, memory=0.0)


def test_across_a_crossover_each_plan_follows_the_model():
    # Rows: 1 s at 256 tokens, so 8 s at 2048; they were not worth a measurement at 4096. Weights: 4 s anywhere.
    rows, weights = DEFAULT, replace(DEFAULT, shard_degree=0)
    at = {tokens: key(tokens=tokens, world=2, ranks_per_node=1) for tokens in (256, 512, 2048, 4096)}
    few = record(candidate(weights, 4.0), at=at[256], default=rows)
    many = record(at=at[4096], seconds=4.0, default=weights)
    lookup = look_up(few, many, model=Links())
    for tokens, best in ((512, rows), (2048, weights)):
        asked = workload(at[tokens], shard_degrees=(0, 1))
        for default in (rows, weights):
            answer = lookup.find(at[tokens], asked, default.plan(Plan()))
            assert answer.plan == best.plan(Plan())
            predicted = {c.plan: c.predicted for c in answer.considered}
            assert predicted == {rows: pytest.approx(tokens / 256), weights: pytest.approx(4.0)}


def test_a_small_gain_far_away_is_not_taken():
    lookup = look_up(record(candidate(BMM, 0.975), at=key()))
    assert stored(ask(lookup, key(tokens=1280))) == BMM  # 0.3 octaves: a margin of 1.3%
    assert stored(ask(lookup, key(tokens=4096))) == DEFAULT  # 2 octaves: 3%


def test_beyond_the_cap_nothing_near_is_taken():
    answer = ask(look_up(record(candidate(BMM, 0.1))), key(tokens=16384))
    assert (answer.tier, stored(answer)) == ("default", DEFAULT)
    assert "4 octaves away, more than 3" in answer.reason
    assert [tried.tier for tried in answer.tried] == ["exact", "nearest", "sibling", "model"]


def test_another_kind_is_not_near():
    for change in ({"dtype": "bfloat16"}, {"training": False}, {"threads": 1}, {"expert_numbers": 3 * 64 * 128}):
        assert ask(look_up(record(candidate(BMM, 0.1))), key(**change)).tier == "default"


def test_another_default_than_that_of_the_record():
    # Where the rules would run PADDED today, gains are over PADDED: GROUPED takes 0.8 / 0.5 of its time.
    found = record(candidate(PADDED, 0.5), candidate(GROUPED, 0.8))
    asked = workload()
    answer = look_up(found).find(key(), asked, Plan(layout="padded"))
    assert stored(answer) == PADDED
    assert {c.plan: c.ratio for c in answer.considered}[GROUPED] == pytest.approx(1.6)


def test_sibling():
    sibling = on(HERE, units=4, memory_rate=20.0)
    found = record(candidate(BMM, 0.5), hardware=sibling, at=key(threads=4))
    answer = ask(look_up(found), key(threads=2))  # all cores there, all cores here
    assert (answer.tier, stored(answer), answer.distance) == ("sibling", BMM, 2.0)
    assert sibling.folder in answer.reason
    assert ask(look_up(found), key(threads=1)).tier == "default"
    assert (
        ask(look_up(record(hardware=on(sibling, units=64, memory_rate=90.0), at=key(threads=64))), key()).tier
        == "default"
    )
    own = record(candidate(GROUPED, 0.5))
    assert stored(ask(look_up(found, own), key())) == GROUPED


def test_links_count_only_over_ranks():
    linked = on(HERE, intra_link="tcp", intra_rate=1.0, ranks_per_node=2)
    alone = record(candidate(BMM, 0.5), hardware=linked)
    assert ask(look_up(alone), key()).tier == "exact"
    at = key(world=2, ranks_per_node=2)
    together = record(candidate(BMM, 0.5), hardware=on(linked, intra_rate=100.0), at=at)
    assert ask(look_up(together, hardware=linked), at).tier == "default"
    assert ask(look_up(replace(together, hardware=linked), hardware=linked), at).tier == "exact"


def test_model():
    answer = ask(look_up(model=Model(ragged=2.0, padded=1.0)), key(), expert_kernels=("tiled",))
    assert (answer.tier, answer.plan.layout, answer.predicted) == ("model", "padded", 1.0)
    answer = ask(look_up(model=Model(ragged=1.2, padded=1.0)), key())
    assert (answer.tier, answer.plan.layout, answer.predicted) == ("default", "ragged", 1.2)


def test_other_versions_count_after_these_and_are_named():
    old = record(candidate(BMM, 0.5), software={"tutelx": "0.1.0", "torch": "2.9.0"})
    answer = ask(look_up(old), key())
    assert (answer.tier, stored(answer)) == ("exact", BMM)
    assert "torch 2.9.0, not 2.13.0+cpu" in answer.reason
    new = record(candidate(GROUPED, 0.9), software={"tutelx": "0.1.0", "torch": "2.13.0"})
    answer = ask(look_up(old, new), key())
    assert stored(answer) == GROUPED
    assert "not" not in answer.reason.split(";")[1]
    # A near key of these versions goes before a nearer one of others.
    near = replace(new, key=key(tokens=4096))
    assert stored(ask(look_up(replace(old, key=key(tokens=1280)), near), key())) == GROUPED


def test_what_is_added_is_found():
    lookup = look_up()
    assert ask(lookup, key()).tier == "default"
    lookup.database.add(record(candidate(BMM, 0.5)), layer="process")
    assert ask(lookup, key()).tier == "exact"


def test_predict():
    lookup = look_up(record(candidate(BMM, 0.5)), model=Model(ragged=7.0, padded=8.0))
    assert lookup.predict(key(), workload(), BMM.plan(Plan())) == pytest.approx(0.5)
    # Twice the tokens from one key: twice the time.
    assert lookup.predict(key(tokens=2048), workload(key(tokens=2048)), BMM.plan(Plan())) == pytest.approx(1.0)
    rule = RULES.plan(workload())
    assert lookup.predict(key(), workload(), rule.plan, rule) == pytest.approx(1.0)
    assert lookup.predict(key(), workload(), GROUPED.plan(Plan())) == 7.0
    assert look_up().predict(key(), workload(), Plan()) is None


def test_a_snapshot_answers_alike():
    records = [record(candidate(BMM, 0.25), at=key(tokens=256)), record(candidate(BMM, 4.0), at=key(tokens=4096))]
    other = record(candidate(GROUPED, 0.5), at=key(dtype="bfloat16"))
    lookup = look_up(*records, other)
    again = Lookup.from_json(lookup.relevant(key().kind).to_json())
    assert len(again.database.records()) == 2
    for tokens in (256, 512, 1024, 4096):
        assert ask(again, key(tokens=tokens)) == ask(lookup, key(tokens=tokens))
    for broken in ("", "[]", "{}", '{"records": [1]}', lookup.to_json().replace('"layer"', '"lair"')):
        with pytest.raises(InvalidValueError):
            Lookup.from_json(broken)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([128, 256, 1024, 4096]),
            st.sampled_from([1, 2, 4]),
            st.sampled_from([1.0, 2.0]),
            st.floats(0.05, 20),
            st.floats(0.05, 20),
        ),
        max_size=8,
        unique_by=lambda each: each[:3],
    ),
    st.sampled_from([64, 512, 1024, 2048]),
    st.sampled_from([1, 2, 3, 8]),
)
def test_estimates_lie_between_what_was_measured(measured, tokens, top_k):
    records = [
        record(candidate(BMM, a), candidate(GROUPED, b), at=key(tokens=t, top_k=k, load_factor=f))
        for t, k, f, a, b in measured
    ]
    answer = ask(look_up(*records), key(tokens=tokens, top_k=top_k))
    assert answer == ask(look_up(*reversed(records)), key(tokens=tokens, top_k=top_k))
    ratios = {BMM: [m[3] for m in measured], GROUPED: [m[4] for m in measured], DEFAULT: [1.0]}
    for each in answer.considered:
        assert min(ratios[each.plan]) * (1 - 1e-6) <= each.ratio <= max(ratios[each.plan]) * (1 + 1e-6)
        assert each.predicted is None or (math.isfinite(each.predicted) and each.predicted > 0)
    if answer.tier in ("exact", "nearest"):
        chosen = {c.plan: c.ratio for c in answer.considered}[stored(answer)]
        assert chosen <= 1.0


def test_tiles_are_compared_relative_to_the_rules_and_as_numbers():
    # 2 threads, 8 experts, K=2, an even load: 256 rows an expert at 1024 tokens, 1024 at 4096: the rules' tiles, as
    # each is at most half a thread's share of the rows. Half the rules' columns are 512 at both.
    def wide(**change):
        return key(model_dim=1024, hidden_dim=2048, expert_numbers=2 * 1024 * 2048, **change)

    rows = {1024: 256, 2048: 512, 4096: 1024}
    for tokens, expected in rows.items():
        at = wide(tokens=tokens)
        assert RULES.plan(workload(at)).plan.tile_rows == of_rules(at).rows == expected
    narrow = {t: replace(DEFAULT, tile_rows=rows[t], tile_columns=512) for t in (1024, 4096)}
    lookup = look_up(*(record(candidate(plan, 0.5), at=wide(tokens=t)) for t, plan in narrow.items()))
    plan = ask(lookup, wide(tokens=2048)).plan
    assert (plan.tile_rows, plan.tile_columns) == (512, 512)
    assert str(replace(DEFAULT, tile_columns=512)) == "ragged/*x512"
    # An expert of 128 columns is not cut by tiles of 512.
    assert ask(look_up(record(candidate(replace(DEFAULT, tile_columns=512), 0.5))), key(tokens=1280)).tier == "nearest"
    # 128 rows are 128 rows everywhere.
    small = replace(DEFAULT, tile_rows=128, tile_columns=512)
    lookup = look_up(*(record(candidate(small, 0.5), at=wide(tokens=t)) for t in (1024, 4096)))
    plan = ask(lookup, wide(tokens=2048)).plan
    assert (plan.tile_rows, plan.tile_columns) == (128, 512)
    assert lookup.predict(wide(tokens=2048), workload(wide(tokens=2048)), plan) == pytest.approx(0.5)


def test_another_machine_from_now_on():
    lookup = look_up(record(candidate(BMM, 0.5)), hardware=on(HERE, units=64))
    assert ask(lookup, key()).tier == "default"
    lookup.hardware = HERE
    assert ask(lookup, key()).tier == "exact"
