"""The report page in a real browser: what it says, how it sorts, and that nothing a model said is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from support.browser import needs_browser, photograph, render
from support.scores import make_predictions, make_scores
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.results import Prediction, Scores
from tunesmith.evaluate.table import format_scores
from tunesmith.runs.folder import RunDir
from tunesmith.tracking.jsonl import MetricsLog
from tunesmith.view.figures import render_loss_curve

NASTIES = (
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "</div></details></article><style>body { display: none }</style>",
    "\"' onmouseover=\"document.title = 'owned'\" x='",
    "{{ scores }} {% raw %} &lt;b&gt; <!-- ",
    "</script><script>document.title = 'owned'</script>",
    "a lone surrogate \ud83d and \u202e turned text",
)


class Texts(HTMLParser):
    """The texts of the elements with class `text`, in the order of the page, and all the tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self._reading = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._reading = "text" in (dict(attrs).get("class") or "").split()
        if self._reading:
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._reading = False

    def handle_data(self, data: str) -> None:
        if self._reading:
            self.texts[-1] += data


def order_of(document: str) -> list[int]:
    return [int(number) for number in re.findall(r'<article data-id="(\d+)"', document)]


def written(folder: Path, scores: Scores, rows: list[Prediction], curve: bytes | None = None) -> Path:
    page = folder / "report.html"
    before = set(folder.iterdir())
    write_report(scores, rows, curve, page)
    assert set(folder.iterdir()) - before == {page}, "nothing else is left behind"
    return page


def draw_curve(folder: Path) -> bytes:
    """Return the loss curve of a run that was never trained."""
    run = RunDir(folder, "results", "tiny", "a-run")
    log = MetricsLog(run.metrics_path, 1, {})
    for step in range(1, 41):
        log.training(step, {"loss": 2 + 2 * 0.9**step})
        if step % 10 == 0:
            log.evaluation(step, {"eval_loss": 2.1 + 2 * 0.9**step})
    log.close()
    return render_loss_curve(run)


@needs_browser
@pytest.mark.slow
def test_the_page_says_it_all_in_a_browser(tmp_path: Path) -> None:
    scores, rows = make_scores(make_predictions(24))
    page = written(tmp_path, scores, rows, draw_curve(tmp_path / "run"))
    document = render(page)
    assert scores["verdict"]["outcome"] == "better"
    assert "Better than its base" in document and scores["verdict"]["text"] in document
    for said in ("numeric match", "ROUGE-L F1", "3.0412", "8.42", "roberta-large", "checkpoint_00000040"):
        assert said in document
    assert 'src="data:image/png;base64,' in document
    photograph(page, height=3600)


@needs_browser
@pytest.mark.slow
def test_samples_are_sorted_by_gain_by_loss_and_by_number(tmp_path: Path) -> None:
    rows = make_predictions(9)
    rows[4]["base_prediction"] = rows[4]["reference"]
    rows[4]["prediction"] = "nothing of the kind"
    rows[7]["prediction"] = rows[7]["base_prediction"] or ""
    scores, scored = make_scores(rows, ["chrf"])
    page = written(tmp_path, scores, scored)
    by_gain = sorted(scored, key=lambda row: row["base_scores"]["chrf"] - row["scores"]["chrf"])  # type: ignore
    expected = [row["id"] for row in by_gain]
    assert order_of(page.read_text()) == expected, "so it stands without the script"
    assert order_of(render(page)) == order_of(render(page, "#gained")) == expected
    lost = render(page, "#lost")
    assert order_of(lost) == expected[::-1]
    assert order_of(lost)[0] == 4
    assert re.search(r'<a href="#lost" aria-current="true">', lost)
    assert order_of(render(page, "#in-order")) == list(range(9))


@needs_browser
@pytest.mark.slow
def test_nothing_that_a_model_said_is_run(tmp_path: Path) -> None:
    rows = make_predictions(len(NASTIES))
    for row, nasty in zip(rows, NASTIES, strict=True):
        row.update(input=nasty, reference=nasty, prediction=nasty, base_prediction=nasty)
    scores, scored = make_scores(rows, ["chrf"], run=NASTIES[1], why=NASTIES[0], test_set=NASTIES[3])
    document = render(written(tmp_path, scores, scored))
    # What `onerror` would do if it ran, and the headline that the title has.
    assert re.search(r"<title>No clear difference: ", document)
    found = Texts(document)
    assert found.tags.count("script") == found.tags.count("style") == 1
    assert found.tags.count("img") == 0
    assert "onmouseover" not in re.sub(r">[^<]*<", "><", document)
    for nasty in NASTIES:
        shown = nasty.replace("\ud83d", "?")
        assert found.texts.count(shown) == 4, "input, reference, base and tuned, to the letter"


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    scores, rows = make_scores(make_predictions(8))
    page = written(tmp_path, scores, rows, draw_curve(tmp_path / "run")).read_text()
    assert not re.findall(r"https?:|//\w+\.\w|@import|url\(", page)
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_texts_keep_their_lines_and_long_ones_are_folded_whole(tmp_path: Path) -> None:
    rows = make_predictions(3, compare=False)
    poem = "\n".join(f"line {i} of a long answer" for i in range(60))
    unbroken = "x" * 5000
    rows[0]["prediction"], rows[1]["prediction"], rows[2]["prediction"] = poem, unbroken, "  a\n\n\tb "
    scores, scored = make_scores(rows, ["chrf"])
    page = written(tmp_path, scores, scored).read_text()
    texts = Texts(page).texts
    assert "  a\n\n\tb " in texts
    for long in (poem, unbroken):
        (head,) = [head for head, rest in pairwise(texts) if head and head + rest == long]
        assert len(head) <= 700
    assert page.count('<details class="long">') == 2


def test_of_many_samples_the_two_ends_are_shown(tmp_path: Path) -> None:
    rows = make_predictions(230)
    rows[17]["reference"] = "no number in sight"
    scores, scored = make_scores(rows, ["numeric_match", "chrf"])
    page = written(tmp_path, scores, scored).read_text()
    order = order_of(page)
    assert len(order) == len(set(order)) == 200
    assert 17 not in order, "what has no gain gives way"
    assert "Of 230 samples, the 100 at either end are shown" in page

    def gain(number: int) -> list[float]:
        tuned, base = scored[number]["scores"], scored[number]["base_scores"]
        return [tuned[name] - base[name] for name in ("numeric_match", "chrf")]  # type: ignore[index, operator]

    gains = [gain(number) for number in order]
    assert gains == sorted(gains, reverse=True)
    hidden = [gain(number) for number in range(230) if number not in (17, *order)]
    assert gains[99] >= max(hidden) and min(hidden) >= gains[100]


def test_a_model_alone_is_reported_without_a_base(tmp_path: Path) -> None:
    scores, rows = make_scores(make_predictions(12, compare=False))
    page = written(tmp_path, scores, rows).read_text()
    assert "Not compared" in page and scores["verdict"]["outcome"] == "alone"
    assert "Base model" not in page and "gained" not in re.sub(
        r"#gained|\"gained\"", "", page.split("<script>")[0]
    )
    assert ">Highest<" in page


def test_the_table_in_the_terminal_has_every_score(tmp_path: Path) -> None:
    scores, _ = make_scores(make_predictions(24))
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(format_scores(scores))
    text = console.export_text()
    lines = text.splitlines()
    assert text.replace("\n", " ").replace("  ", " ").startswith(scores["verdict"]["text"])
    (rouge,) = [line for line in lines if line.strip().startswith("ROUGE-L F1")]
    metric = scores["metrics"]["rougeL"]
    for value in (metric["base"]["mean"], metric["tuned"]["mean"], metric["difference"]["high"]):  # type: ignore
        assert f"{value:.3f}" in rouge
    assert any("perplexity" in line and "20.93" in line and "8.42" in line for line in lines)
    assert "roberta-large" in text and "tokens/s" in text
