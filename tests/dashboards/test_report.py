import itertools
import re
from html.parser import HTMLParser

import pytest
from hqlt_dashboards.report import report
from hqlt_search_space.errors import NoResultError
from hqlt_search_space.mixers import Attention, FastWeight
from hqlt_search_space.paper import paper_arch
from hqlt_search_space.recipe import Recipe
from hqlt_search_space.tasks import ModularArithmetic, Parity
from hqlt_search_space.trial import AxisImportance, Backend, Config, Importances, KnockOut, MeanGate, Objective

ACCURACY = "normalised_validation_accuracy"
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Elements, section titles and the text of a report; fails on elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.cells: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "h2":
            self.titles.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data
        if "td" in self._open or "th" in self._open:
            self.cells[-1][-1] += data
        if "h2" in self._open:
            self.titles[-1] += data


@pytest.fixture(scope="session")
def read(make_background):
    def read(results, **background):
        return Page(report(results, make_background(results, **background)))

    return read


def with_memories(replica):
    silenced = tuple(KnockOut(silenced=m, metrics={ACCURACY: value}) for m, value in (("kv", 0.7), ("fw", 0.1)))
    gates = (MeanGate(layer=0, kv=0.25, fw=0.75), MeanGate(layer=1, kv=0.5, fw=0.5))
    return replica.model_copy(update={"knock_outs": silenced, "gates": gates})


@pytest.fixture(scope="session")
def search(make_study, make_record, make_replica):
    """A search that has something for every section but the ablation's."""
    hybrid = make_record(2, 0.8, 2048.0)
    said = Importances(
        objective=ACCURACY,
        n_trials=20,
        n_best=5,
        axes=(
            AxisImportance(axis="rule", share=0.8, chance=0.4),
            AxisImportance(axis="window", share=0.2, chance=0.3),
        ),
    )
    return make_study(
        make_record(0, 0.9, 4096.0, layers=(FastWeight(n_heads=2),)),
        make_record(1, 0.5, 1024.0, layers=(Attention(n_heads=2),)),
        hybrid.model_copy(update={"replicas": tuple(map(with_memories, hybrid.replicas))}),
        make_record(3, None),
        importances=(said, Importances(objective="state_bytes", n_trials=4, n_best=4, silent="4 are too few")),
    )


@pytest.fixture(scope="session")
def ablation(make_study, make_record, make_replica):
    cells = {"baseline": (0.9, 0.8, 0.7), "window=4": (0.3, 0.2, 0.4), "mixing=sum": (0.8, None, 0.9)}
    records = [
        make_record(i, 0.5, cell=cell, replicas=tuple(make_replica(seed, value) for seed, value in enumerate(values)))
        for i, (cell, values) in enumerate(cells.items())
    ]
    return make_study(*records, objectives=(Objective(name=ACCURACY, direction="maximize"),), seeds=(0, 1, 2))


def test_a_search_has_every_section_that_it_has_something_for(read, search):
    page = read(search)
    assert page.titles == [
        "What was asked",
        "The answer",
        "The front",
        "Which axes decide",
        "Learning curves",
        "Which memory did it?",
        "What failed",
        "Run it again",
    ]
    assert ["rule", "", "80%", "40%", "stands out"] in page.cells
    assert ["window", "", "20%", "30%", "chance"] in page.cells
    assert "Nothing can be said: 4 are too few." in page.text
    assert "trial 3, seed 0, step 40: loss is not finite" in page.text
    assert [
        "trial 2",
        "hybrid synchronous delta W8 dynamic_vector x2",
        "0.8",
        "0.7",
        "0.1",
        "0.25 to 0.50",
        "0.50 to 0.75",
    ] in page.cells


def test_an_ablation_has_its_table_in_place_of_a_front(read, ablation):
    page = read(ablation)
    assert "The front" not in page.titles
    assert "What each change does" in page.titles
    rows = {row[0]: row[-2:] for row in page.cells if len(row) == 7}
    assert rows["window=4"] == ["worse", "3"]
    assert rows["mixing=sum"] == ["not told apart", "2 of 3"]
    assert "hqlt rerun parity-blends/1" in page.text


def test_an_ablation_on_two_tasks_has_a_table_a_picture_and_a_command_for_each(read, make_study, make_record):
    """Its cells are models of the paper, so the published numbers stand beside them."""
    records = []
    for task in (Parity(), ModularArithmetic()):
        for cell, model in {"baseline": "hqlt_synchronous", "deltanet": "deltanet"}.items():
            config = Config(arch=paper_arch(model, task.kind), recipe=Recipe(), task=task)
            records.append(make_record(len(records), 0.5 + len(records) / 10, cell=cell, config=config))
    page = read(make_study(*records, seeds=(0,)))
    captions = [a["aria-label"] for name, a in page.elements if name == "div" and "aria-label" in a]
    assert "parity-blends, parity: normalised validation accuracy" in captions
    assert "parity-blends, modular arithmetic: normalised validation accuracy" in captions
    assert page.text.count("Beside the published numbers") == 2
    assert [name for name, _ in page.elements].count("figcaption") == 2
    assert ["3", "deltanet, modular arithmetic", "hqlt rerun parity-blends/3"] in page.cells
    assert "The front" not in page.titles


def test_a_plain_search_of_one_objective_has_no_empty_section(read, make_study, make_record):
    results = make_study(make_record(0, 0.5), objectives=(Objective(name=ACCURACY, direction="maximize"),))
    assert read(results).titles == ["What was asked", "The answer", "The front", "Learning curves", "Run it again"]


def test_a_study_that_goes_on_says_how_far_it_is_and_how_to_go_on(read, search):
    page = read(search, state="open", options=" --data elsewhere")
    assert "Not finished: 4 of 12 trials (3 complete, 1 failed). This is how it stood." in page.text
    assert "hqlt study resume parity-blends --data elsewhere" in page.text
    assert "hqlt rerun parity-blends/0 --data elsewhere" in page.text
    assert "hqlt study resume" not in read(search).text


def test_a_study_of_failures_alone_is_reported_and_one_without_any_end_is_refused(
    read, make_study, make_record, make_background
):
    lost = make_record(0, None, replicas=(), state="quarantined")
    page = read(make_study(lost), last_words={0: "Traceback\nMemoryError: no room"})
    assert "trial 0: quarantined: MemoryError: no room" in page.text
    waiting = make_study(make_record(0, None, replicas=(), state="running"))
    with pytest.raises(NoResultError, match="no finished trial yet"):
        report(waiting, make_background(waiting))


def hostile(results, background, text):
    """The study with `text` in every place that another program, or a person, may have written."""
    trials = [
        record.model_copy(
            update={
                "cell": record.cell and f"{record.cell}{text}",
                "choices": {"first": text},
                "replicas": tuple(
                    r.model_copy(update={"message": text} if r.status == "failed" else {}) for r in record.replicas
                ),
            }
        )
        for record in results.trials
    ]
    (environment,) = background.environments
    changes = {
        "file_text": text,
        "note": text,
        "environments": (environment.model_copy(update={"cpu": text, "platform": text}),),
        "backends": (Backend(operator=text, backend=text, reason=text),),
        "notes": (text,),
        "options": f" --data {text}",
    }
    return results.model_copy(update={"name": text, "trials": tuple(trials)}), changes


@pytest.mark.parametrize("kind", ["search", "ablation"])
def test_no_text_of_a_study_becomes_an_element(kind, read, request, make_background):
    results = request.getfixturevalue(kind)
    background = make_background(results)
    attack = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>$x_{1}$ &lt;b&gt; ]]> -->"""
    pages = []
    for text in (re.sub(r"[<>&\"'$]", "x", attack), attack):
        written, changes = hostile(results, background, text)
        pages.append(read(written, study=background.study, **changes))
    assert [name for name, _ in pages[0].elements] == [name for name, _ in pages[1].elements]
    assert pages[1].text.count(attack) >= 6
    assert not [key for _, attributes in pages[1].elements for key in attributes if key.startswith("on")]


@pytest.mark.parametrize("kind", ["search", "ablation"])
def test_a_reader_without_eyes_or_without_a_mouse_finds_everything(kind, read, request):
    page = read(request.getfixturevalue(kind))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {a["href"].removeprefix("#") for name, a in page.elements if name == "a"} <= ids
    levels = [int(name[1]) for name, _ in page.elements if name in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    for name, attributes in page.elements:
        if name == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if name == "th":
            assert attributes["scope"] in ("row", "col")
        if attributes.get("tabindex"):
            assert attributes["aria-label"]
    count = [name for name, _ in page.elements].count
    assert count("caption") == count("table") > 0
    assert count("html") == count("main") == count("h1") == 1


def test_equal_studies_make_equal_pages(search, make_background):
    assert report(search, make_background(search)) == report(search, make_background(search))


def test_nothing_on_the_page_is_fetched_or_run(search, make_background):
    page = Page(report(search, make_background(search)))
    links = [a[key] for _, a in page.elements for key in ("href", "xlink:href", "src", "srcset", "action") if key in a]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "script" not in {name for name, _ in page.elements}
