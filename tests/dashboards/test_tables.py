import pytest
from hqlt_dashboards.ablation import ablation_table
from hqlt_dashboards.tables import ablation_text, front_text
from hqlt_search_space.mixers import Attention, DelayedStreaming, Hybrid
from hqlt_search_space.trial import Objective

LONG = (Hybrid(n_heads=2, blend=DelayedStreaming(delay_beta=True), mixing="separate_vector"), Attention(n_heads=2))
NAMES = (
    "normalised_validation_accuracy",
    "validation_bits_per_byte",
    "training_flops_per_token",
    "state_bytes",
    "parameters",
)


@pytest.mark.parametrize("n_objectives", [1, 2, 3, 4], ids=lambda n: f"{n} objectives")
@pytest.mark.parametrize("replicated", [False, True], ids=["search", "replicated"])
def test_the_front_fits_eighty_columns(make_record, make_study, n_objectives, replicated):
    objectives = tuple(Objective(name=name, direction="maximize") for name in NAMES[:n_objectives])
    values = dict.fromkeys(NAMES[:n_objectives], 123456.789)
    replication = {1: 0.1234567, 2: None, 3: 0.2345678} if replicated else {}
    records = [make_record(i, 0.5, objectives=values, layers=LONG, replication=replication) for i in (7, 1234)]
    text = front_text(make_study(*records, objectives=objectives))
    assert max(len(line) for line in text.splitlines()) <= 80


def test_every_word_of_a_member_is_in_the_text(make_record, make_study):
    text = front_text(make_study(make_record(17, 0.98765, 1536, layers=LONG)))
    for word in ("17", "delayed_streaming(delay_beta)", "separate_vector,", "0.9877", "1.5", "KiB"):
        assert word in text.split()


def test_an_id_is_as_long_as_it_must_be_to_be_unique(make_record, make_study):
    records = [make_record(i, 0.5) for i in range(3)]
    text = front_text(make_study(*records))
    assert all(record.trial_id[:8] in text and record.trial_id[:9] not in text for record in records)


def test_the_values_of_the_search_say_who_waits_for_replication(make_record, make_study):
    records = [make_record(0, 0.9, 100, replication={1: 0.5}), make_record(1, 0.8, 50), make_record(2, 0.7, 25)]
    assert "Values of the search: trials 1, 2 not replicated yet." in front_text(make_study(*records))


def test_an_interval_of_few_seeds_carries_its_warning(make_record, make_study):
    text = front_text(make_study(make_record(0, 0.9, replication={1: 0.5, 2: 0.6, 3: 0.7})))
    assert "[0.5, 0.7]" in text
    assert "3 seeds: the interval is their range and holds the true mean about 3 times" in text


def test_a_study_without_a_result_has_a_sentence_for_a_front(make_study):
    assert front_text(make_study()) == "study 'parity-blends' has no complete trial yet, so it has no front\n"


def test_an_ablation_fits_eighty_columns_and_narrower_ones(make_record, make_study, make_replica):
    replicas = [make_replica(seed, 0.5 + seed / 100) for seed in range(3)]
    cells = ("baseline", "blend=delayed_streaming, mixing=separate_vector, rule=delta_product")
    table = ablation_table(
        make_study(*[make_record(i, cell=cell, replicas=replicas, phase="ablate") for i, cell in enumerate(cells)]),
        "normalised_validation_accuracy",
    )
    for width in (80, 62):
        assert max(len(line) for line in ablation_text(table, width).splitlines()) <= width
