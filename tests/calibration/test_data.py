import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM, AutoTokenizer

from scalesweep_hf.calibration import calibration_tokens
from scalesweep_hf.calibration.data import check_source
from tests.conftest import load_example
from tests.models import load, random_tokens


@pytest.fixture(scope="module")
def model(trained_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(trained_model)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(load_example("tiny_model").make_text(5, 20))


def tokens_of(dataset: Any, model: Any, **changes: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"num_samples": 4, "sequence_length": 48}
    return calibration_tokens(dataset, model, **(settings | changes))[0]


def test_a_model_writes_its_own_text_reproducibly(model: Any) -> None:
    state = torch.get_rng_state()
    config = model.generation_config
    first, provenance = calibration_tokens("self", model, num_samples=5, sequence_length=40, seed=3)
    assert first.shape == (5, 40)
    assert first.dtype == torch.int64
    assert (first[:, 0] == 0).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is config
    again, same = calibration_tokens("self", model, num_samples=5, sequence_length=40, seed=3)
    assert torch.equal(first, again)
    assert provenance == same
    assert provenance | {"sha256": ""} == {
        "source": "self",
        "num_samples": 5,
        "sequence_length": 40,
        "seed": 3,
        "sha256": "",
    }
    other, _ = calibration_tokens("self", model, num_samples=5, sequence_length=40, seed=4)
    assert not torch.equal(first, other)


def test_rows_are_written_in_batches_and_end_tokens_do_not_stop_them(model: Any) -> None:
    tokens = tokens_of("self", model, num_samples=5, batch_size=2, sequence_length=512)
    assert tokens.shape == (5, 512)
    assert len({tuple(row.tolist()) for row in tokens}) == 5
    assert (tokens == 1).any()


def test_what_a_trained_model_writes_is_likely(model: Any) -> None:
    """Sampled text has about the perplexity of held-out text; random tokens are far off."""

    def perplexity(tokens: torch.Tensor) -> float:
        with torch.no_grad():
            logits = model(input_ids=tokens).logits.float()
        loss = torch.nn.functional.cross_entropy
        return float(loss(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp())

    written = perplexity(tokens_of("self", model, num_samples=8, sequence_length=128))
    heldout = load_example("tiny_model").heldout_tokens(Path(model.name_or_path), 8, 128)
    assert written < 2 * perplexity(heldout)


def test_a_chat_template_opens_the_rows(model: Any, trained_model: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(trained_model)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}to {{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    chat = AutoModelForCausalLM.from_pretrained(tmp_path)
    row = tokens_of("self", chat, num_samples=1)[0]
    start = tokenizer("to user: ", add_special_tokens=False)["input_ids"]
    assert row[: len(start) + 1].tolist() == [0, *start]


def test_length_is_clipped_to_what_the_model_takes(model: Any) -> None:
    assert tokens_of(torch.ones(2, 4096, dtype=torch.int64), model, sequence_length=2048).shape == (
        2,
        model.config.max_position_embeddings,
    )


def test_strings_are_packed_into_full_rows(model: Any, texts: list[str]) -> None:
    tokens = tokens_of(texts, model)
    assert tokens.shape == (4, 48)
    assert (tokens[:, 0] == 0).all()
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    stream = tokens[:, 1:].flatten().tolist()
    expected = [*tokenizer(texts[0], add_special_tokens=False)["input_ids"], 1]
    assert stream[: len(expected)] == expected[: len(stream)]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_local_files_are_read(
    suffix: str, model: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"texts{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"id": "a", "text": text}) for text in texts))
    elif suffix == ".txt":
        path.write_text("\n".join(texts))
    else:
        import datasets

        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(path))
    tokens, provenance = calibration_tokens(str(path), model, num_samples=4, sequence_length=48)
    assert tokens.shape == (4, 48)
    assert provenance["source"] == path.name
    assert torch.equal(tokens, tokens_of(str(path), model))
    if suffix == ".jsonl":
        assert not torch.equal(tokens, tokens_of(str(path), model, seed=1))


def test_too_little_text_is_an_error_or_a_warning(model: Any, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="fewer than 47 tokens"):
        tokens_of(["Once."], model)
    assert tokens_of(texts[:3], model, num_samples=1000).shape[0] < 1000


BAD: list[tuple[Any, str]] = [
    (torch.zeros(2, 4), "dtype torch.float32"),
    (torch.zeros(8, dtype=torch.int64), r"shape \[8\]"),
    (torch.full((1, 4), 5000), "outside the vocabulary of 1024"),
    (torch.full((1, 4), -1), "outside the vocabulary"),
]


@pytest.mark.parametrize(("tokens", "message"), BAD)
def test_bad_token_tensors_are_errors(tokens: torch.Tensor, message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        tokens_of(tokens, model)


def test_a_missing_file_is_an_error(model: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.txt' does not exist"):
        tokens_of("nowhere.txt", model)


def test_files_of_other_kinds_are_errors(model: Any, tmp_path: Path) -> None:
    for dataset in ("notes.csv", str(tmp_path), "./notes"):
        with pytest.raises(ValueError, match=r"is not a file of a kind that is read: \.jsonl"):
            check_source(dataset)


def test_rows_must_be_longer_than_what_they_start_with(model: Any) -> None:
    with pytest.raises(ValueError, match="sequence_length is 1, but rows start with 1 tokens"):
        tokens_of("self", model, sequence_length=1)


def test_positions_kept_for_padding_are_not_used() -> None:
    config = tf.RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=66,
    )  # fmt: skip
    roberta = tf.RobertaModel(config)
    rows = tokens_of(torch.full((2, 128), 5), roberta, sequence_length=128)
    assert rows.shape == (2, 64)
    roberta(input_ids=rows)


def test_a_file_without_text_is_an_error(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "x", "b": "y"}\n')
    with pytest.raises(ValueError, match=r"has columns \['a', 'b'\]; it needs a string column"):
        tokens_of(str(path), model)


def test_text_without_a_tokenizer_is_an_error(random_model: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="no tokenizer found"):
        tokens_of(["text"], load(random_model("llama")))


def test_a_model_without_a_begin_token_cannot_write(random_model: Callable[[str], Path]) -> None:
    model = load(random_model("llama"))
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match=r"has no begin token \(bos_token_id\)"):
        tokens_of("self", model)


def test_short_integer_tensors_are_token_ids(random_model: Callable[[str], Path]) -> None:
    tokens = random_tokens(6, 16).to(torch.int16)
    assert torch.equal(tokens_of(tokens, load(random_model("llama"))), tokens[:4].long())
