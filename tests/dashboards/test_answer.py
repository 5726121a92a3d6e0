import pytest
from hqlt_dashboards.ablation import ablation_table
from hqlt_dashboards.answer import answer, verdict
from hqlt_search_space.mixers import Attention, FastWeight
from hqlt_search_space.trial import Objective
from hypothesis import given, settings
from hypothesis import strategies as st

ACCURACY = "normalised_validation_accuracy"
SEEDS = (0, 1, 2)


@pytest.fixture(scope="session")
def make_ablation(make_study, make_record, make_replica):
    """An ablation of cells by name, each with an accuracy a seed."""

    def make(direction="maximize", **cells):
        records = [
            make_record(i, values[0], cell=cell, replicas=tuple(map(make_replica, SEEDS, values)))
            for i, (cell, values) in enumerate(cells.items())
        ]
        return make_study(*records, objectives=(Objective(name=ACCURACY, direction=direction),), seeds=SEEDS)

    return make


VALUES = st.lists(st.floats(0, 1).map(lambda value: round(value, 3)), min_size=3, max_size=3)


@given(baseline=VALUES, other=VALUES)
@settings(max_examples=60, deadline=None)
def test_a_cell_is_better_only_if_it_is_on_every_seed_and_worse_if_the_direction_turns(make_ablation, baseline, other):
    """Of three seeds the interval is their range, so it leaves out 0 if all differences have one sign."""
    turned = {"better": "worse", "worse": "better", "not told apart": "not told apart"}
    verdicts = []
    for direction in ("maximize", "minimize"):
        table = ablation_table(make_ablation(direction, baseline=baseline, other=other), ACCURACY)
        verdicts.append(verdict(table.rows[1], direction))
    assert verdicts[1] == turned[verdicts[0]]
    differences = [b - a for a, b in zip(baseline, other, strict=True)]
    assert (verdicts[0] == "better") == all(d > 0 for d in differences)
    assert (verdicts[0] == "worse") == all(d < 0 for d in differences)


def test_an_ablation_is_answered_by_its_intervals_and_says_what_three_seeds_are_worth(make_ablation):
    sentences = answer(
        make_ablation(
            baseline=(0.5, 0.5, 0.5), a=(0.9, 0.8, 0.7), b=(0.1, 0.2, 0.3), c=(0.4, 0.5, 0.6), d=(0.7, None, None)
        )
    )
    assert sentences == [
        "The baseline has a normalised validation accuracy of 0.5 [0.5, 0.5] over 3 seeds.",
        "Better than it by an interval that leaves out 0: a (+0.3 [+0.2, +0.4]).",
        "Worse than it by an interval that leaves out 0: b (-0.3 [-0.4, -0.2]).",
        "Not told apart from it: c (0 [-0.1, +0.1]).",
        "On one seed, without an interval to judge by: d (+0.2).",
        "1 seed: no interval.",
        "3 seeds: the interval is their range and holds the true mean about 3 times in 4, not 95 %.",
        "No interval is widened for there being 4 comparisons.",
    ]


def test_a_baseline_without_a_value_is_said_before_anything_is_compared(make_ablation):
    (sentence,) = answer(make_ablation(baseline=(None, None, None), a=(0.9, 0.8, 0.7)))
    assert sentence == "The baseline has no value yet, so nothing can be compared with it."


def test_a_search_is_answered_by_the_front_and_by_the_best_of_each_kind(make_study, make_record):
    results = make_study(
        make_record(0, 0.9, 4096.0, layers=(FastWeight(n_heads=2),)),
        make_record(1, 0.5, 1024.0, layers=(Attention(n_heads=2),)),
        make_record(2, 0.4, 4096.0, layers=(Attention(n_heads=2),)),
        seeds=(0,),
    )
    assert answer(results) == [
        "2 of 3 trials with a result are on the front: nothing that was tried is at least as good in every objective "
        "and better in one.",
        "Highest normalised validation accuracy: trial 0, fast_weight delta, with 0.9 (state bytes 4 KiB).",
        "Lowest state bytes: trial 1, attention full, with 1 KiB (normalised validation accuracy 0.5).",
        "These are the values by which the search chose, so they flatter its winners; with replication the study "
        "would train its front again over fresh seeds.",
        "In normalised validation accuracy, as the search saw it on seed 0, the best of each kind of model: "
        "fast_weight 0.9 (trial 0) and attention 0.5 (trial 1).",
        "Trial 0 leads by 0.4, on one seed: that may be luck.",
    ]


@pytest.mark.parametrize(
    ("behind", "said"),
    [
        ({1: 0.5, 2: 0.4, 3: 0.6}, "trial 0 leads trial 1 by 0.3 [0.2, 0.4]."),
        (
            {1: 0.9, 2: 0.4, 3: 0.6},
            "trial 0 leads trial 1 by 0.1667 [-0.1, 0.4]. That may be luck: the interval holds 0.",
        ),
        ({1: 0.8, 2: 0.8, 3: 0.8}, "Trials 0 and 1 are level over the 3 fresh seeds that both have."),
    ],
    ids=["ahead", "perhaps ahead", "level"],
)
def test_a_lead_over_fresh_seeds_is_paired_and_has_an_interval(make_study, make_record, behind, said):
    results = make_study(
        make_record(0, 0.9, 4096.0, layers=(FastWeight(n_heads=2),), replication={1: 0.8, 2: 0.8, 3: 0.8}),
        make_record(1, 0.5, 1024.0, layers=(Attention(n_heads=2),), replication=behind),
    )
    assert said in " ".join(answer(results))


def test_with_one_objective_the_best_is_named_and_ties_are_said(make_study, make_record):
    objectives = (Objective(name=ACCURACY, direction="maximize"),)
    chosen = [{ACCURACY: value} for value in (0.5, 0.9, 0.9)]
    results = make_study(
        *(make_record(i, c[ACCURACY], objectives=c) for i, c in enumerate(chosen)), objectives=objectives
    )
    sentence = answer(results)[0]
    assert sentence.startswith("Of 3 trials with a result, trials 1 and 2 tie: trial 1, hybrid synchronous delta W8")
    assert sentence.endswith("with 0.9, level with trial 2.")


def test_without_a_result_there_is_one_sentence(make_study, make_record):
    assert answer(make_study(make_record(0, None))) == ["No trial has come to a result; 1 failed."]
    assert answer(make_study(make_record(0, None, state="running"))) == ["No trial has come to a result yet."]


def test_a_front_of_one_is_said_in_one_sentence_and_what_three_seeds_are_worth_once(make_study, make_record):
    fresh = {1: 0.8, 2: 0.7, 3: 0.9}
    results = make_study(make_record(0, 0.9, 1024.0, replication=fresh), make_record(1, 0.5, 2048.0))
    sentences = answer(results)
    assert sentences[0] == (
        "Of 2 trials with a result, one is at least as good as all in every objective: trial 0, "
        "hybrid synchronous delta W8 dynamic_vector x2, with 0.8 [0.7, 0.9] over 3 seeds (state bytes 1 KiB)."
    )
    assert len([sentence for sentence in sentences if sentence.startswith("3 seeds:")]) == 1
