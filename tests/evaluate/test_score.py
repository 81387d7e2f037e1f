"""Scores equal those of the libraries called by hand; metrics that can't be had are left out, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_chrf

from support.scores import make_predictions, minilm_folder
from tunesmith.config.tuned import METRICS
from tunesmith.errors import ConfigError, ModelError
from tunesmith.evaluate.metrics.score import Metric, choose_metrics, score_predictions, summarise

PREDICTIONS = ["She has 72 apples.", "", "  \n", "no idea at all, sorry", "72", "word " * 900]
REFERENCES = ["She has 72 apples in all.", "72", "anything", "Paris", "72 ", "a word " * 700]


def metric_called(name: str, references: list[str] = REFERENCES, encoder: Path | None = None) -> Metric:
    chosen, _ = choose_metrics([name], references, str(encoder) if encoder else None, "cpu")
    return chosen[0]


def test_rouge_and_chrf_are_those_of_their_libraries() -> None:
    rouge = RougeScorer(["rougeL"])
    by_hand = [rouge.score(r, p)["rougeL"].fmeasure for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert metric_called("rougeL").score(PREDICTIONS, REFERENCES) == by_hand
    by_hand = [sentence_chrf(p, [r]).score for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert metric_called("chrf").score(PREDICTIONS, REFERENCES) == by_hand
    assert max(by_hand) > 50, "chrF is counted to 100"


def test_exact_match_forgives_white_space_at_the_ends_only() -> None:
    predictions, references = ["a b\n", " a b", "a  b", "A b", ""], ["a b"] * 4 + [" "]
    assert metric_called("exact_match").score(predictions, references) == [1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("so 72\n#### 72", "#### 72", 1),
        ("#### 72", "first #### 3, then\n####72.", 0),
        ("#### 72", "#### 72 dollars, I think", 1),
        ("#### 72", "#### $72.00", 1),
        ("#### 72", "72", 0),
        ("#### 72", "#### seventy-two", 0),
        ("#### 72", "#### 72\n####", 1),
        ("#### 72", "#### 720", 0),
        ("#### 72", "#### 72.5", 0),
        ("#### 72", "#### 72/5", 0),
        ("#### 72", "", 0),
        ("#### 1,234", "#### 1234", 1),
        ("#### 1234", "#### $1,234.", 1),
        ("#### -5", "#### −5", 1),
        ("#### -5", "#### -$5", 1),
        ("#### -5", "#### $-5", 1),
        ("#### -5", "#### 5", 0),
        ("#### 0.50", "#### .5", 1),
        ("72", "#### 72", 1),
        ("#### 72 apples", "#### 72", None),
        ("#### a half", "#### 72", None),
        ("#### 3/4", "#### 3", 0),
        ("#### 3/4", "#### 0.75", 1),
    ],
)
def test_numbers_match_by_value_behind_an_answers_first_marker(
    reference: str, prediction: str, expected: float | None
) -> None:
    metric = metric_called("numeric_match", [reference, "#### 1"])
    assert metric.score([prediction, "#### 1"], [reference, "#### 1"]) == [expected, 1]


def test_bertscore_is_that_of_its_library() -> None:
    from bert_score import BERTScorer

    folder = minilm_folder()
    metric = metric_called("bertscore", encoder=folder)
    by_hand = BERTScorer(model_type=str(folder), num_layers=5, device="cpu")
    filled = [i for i, text in enumerate(PREDICTIONS) if text.strip()]
    _, _, f1 = by_hand.score([PREDICTIONS[i] for i in filled], [REFERENCES[i] for i in filled])
    scores = metric.score(PREDICTIONS, REFERENCES)
    assert [scores[i] for i in filled] == pytest.approx(f1.tolist(), abs=1e-6)
    assert scores[1] == scores[2] == 0, "an empty answer scores nothing, and stops nothing"
    assert "MiniLM-L6" in metric.details and "layer 5" in metric.details


def roberta_folder(folder: Path) -> Path:
    """Write a tiny RoBERTa, whose positions begin after the padding id, with a tokenizer that knows no limit."""
    from transformers import RobertaConfig, RobertaModel

    from support.tokenizers import build_tokenizer

    backend = json.loads(build_tokenizer("byte_bpe").backend_tokenizer.to_str())["model"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *list(backend["vocab"])[1:]]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in backend["merges"]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    config = RobertaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=66,
        pad_token_id=1,
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def test_an_encoder_whose_tokenizer_knows_no_limit_reads_as_far_as_its_positions_go(tmp_path: Path) -> None:
    metric = metric_called("bertscore", encoder=roberta_folder(tmp_path / "encoder"))
    assert "layer 3" in metric.details, "three quarters of four"
    assert "first 64 tokens" in metric.details, "66 positions, two of them before the first token"
    beginning = "the quick brown fox " * 40
    same, other = metric.score([beginning + "one end", "lazy dog"], [beginning + "another end", beginning])
    assert same == pytest.approx(1) and other < 0.99


def test_an_encoder_is_read_at_the_layer_of_the_librarys_table(tmp_path: Path) -> None:
    folder = roberta_folder(tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"_name_or_path": "google/bert_uncased_L-2_H-768_A-12"})
    )
    assert "layer 2" in metric_called("bertscore", encoder=folder).details


def test_everything_that_applies_is_computed_and_the_rest_says_why() -> None:
    chosen, left_out = choose_metrics(None, ["one", "two"], None, "cpu")
    assert [metric.name for metric in chosen] == ["rougeL", "chrf", "exact_match"]
    assert set(left_out) == {"bertscore"}, "numeric_match is not missed where no answer is a number"
    assert "roberta-large" in left_out["bertscore"] and "--bertscore_model" in left_out["bertscore"]
    call = '{"name": "add", "arguments": {"a": 1}}'
    chosen, left_out = choose_metrics(None, ["one", "#### 2", call], str(minilm_folder()), "cpu")
    assert [metric.name for metric in chosen] == list(METRICS) and not left_out


def test_rouge_is_left_out_where_it_sees_no_words() -> None:
    chosen, left_out = choose_metrics(None, ["你好，世界", "再见", "2 个苹果"], None, "cpu")
    assert [metric.name for metric in chosen] == ["chrf", "exact_match"]
    assert "chrf" in left_out["rougeL"]


def test_what_was_asked_for_by_name_and_cant_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="roberta-large"):
        choose_metrics(["bertscore"], REFERENCES, None, "cpu")
    with pytest.raises(ModelError, match="nowhere"):
        choose_metrics(None, REFERENCES, str(tmp_path / "nowhere"), "cpu")
    with pytest.raises(ConfigError, match="no reference comes to one"):
        choose_metrics(["numeric_match"], ["anything", "Paris"], None, "cpu")
    with pytest.raises(ConfigError, match="no reference holds one"):
        choose_metrics(["tool_calls"], REFERENCES, None, "cpu")


def test_an_encoder_without_its_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = roberta_folder(tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layer.2" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack weights: encoder\.layer\.2"):
        metric_called("bertscore", encoder=folder)


def test_a_torn_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    folder = roberta_folder(tmp_path / "encoder")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="can't be had") as caught:
        metric_called("bertscore", encoder=folder)
    assert "--bertscore_model" in str(caught.value)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="can't be had"):
        metric_called("bertscore", encoder=folder)


def test_a_path_that_bert_score_would_misread_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="T5"):
        metric_called("bertscore", encoder=roberta_folder(tmp_path / "best5"))


def test_the_summary_holds_the_means_of_the_samples_scores() -> None:
    rows = make_predictions(40)
    rows[3]["reference"] = "no number"
    chosen, _ = choose_metrics(["chrf", "numeric_match"], [row["reference"] for row in rows], None, "cpu")
    scored = score_predictions(rows, chosen)
    assert rows[0]["scores"] == {}, "the given rows stay as they were"
    assert scored[3]["scores"]["numeric_match"] is None
    summary = summarise(scored, chosen, seed=1)
    for name, num_samples in (("chrf", 40), ("numeric_match", 39)):
        tuned = [row["scores"][name] for row in scored if row["scores"][name] is not None]
        base = [row["base_scores"][name] for row in scored if row["base_scores"][name] is not None]
        metric = summary[name]
        assert metric["num_samples"] == len(tuned) == num_samples
        assert metric["tuned"]["mean"] == pytest.approx(sum(tuned) / len(tuned))
        assert metric["base"]["mean"] == pytest.approx(sum(base) / len(base))
        assert metric["difference"]["mean"] == pytest.approx(metric["tuned"]["mean"] - metric["base"]["mean"])
        assert metric["difference"]["low"] < metric["difference"]["mean"] < metric["difference"]["high"]


def test_without_a_base_there_is_no_difference() -> None:
    rows = make_predictions(5, compare=False)
    chosen, _ = choose_metrics(["chrf"], [row["reference"] for row in rows], None, "cpu")
    scored = score_predictions(rows, chosen)
    summary = summarise(scored, chosen, seed=1)["chrf"]
    assert scored[0]["base_scores"] is None
    assert summary["base"] is None and summary["difference"] is None
