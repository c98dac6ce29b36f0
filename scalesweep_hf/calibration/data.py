"""Token batches for calibration: written by the model itself, or read from what the user names."""

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scalesweep_hf.names import READERS, is_local_file, source_name

WRITING_BATCH = 32


def calibration_tokens(
    dataset: str | Sequence[str] | Tensor,
    model: Any,
    *,
    num_samples: int,
    sequence_length: int,
    seed: int = 0,
    batch_size: int | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Make the token rows that calibrate a model, all of one length.

    Args:
        dataset: "self": the model samples the text itself. A .jsonl, .json, .txt or .parquet path,
            or a Hub data set "name", "name:config" or "name:config:split" (through `datasets`),
            shuffled by the seed; texts are joined by the end token and cut into rows that start
            with the begin token. A list of strings, treated alike but in its order. Or token ids
            [rows, length], used as they are.
        model: a Transformers model; its tokenizer is loaded from ``model.name_or_path``.
        num_samples: rows at the most.
        sequence_length: tokens a row, clipped to what the model takes.
        seed: of the sampling or the shuffling.
        batch_size: rows written at a time by "self"; part of what makes the text reproducible.

    Returns:
        Token ids [rows, length] int64 on the CPU, and their provenance in JSON types.

    Raises:
        ValueError: there is too little text for one row, ids are outside the vocabulary, or the
            model cannot write text.
        FileNotFoundError: a local file is absent.
    """
    length = min(sequence_length, _longest_row(model))
    if isinstance(dataset, Tensor):
        source, tokens = "tokens", _check_tokens(dataset, model)[:num_samples, :length]
    elif dataset == "self":
        source = "self"
        tokens = write_tokens(
            model,
            num_samples=num_samples,
            sequence_length=length,
            seed=seed,
            batch_size=batch_size or WRITING_BATCH,
        )
    else:
        source = source_name(dataset) if isinstance(dataset, str) else "strings"
        texts = _read_texts(dataset, seed) if isinstance(dataset, str) else dataset
        tokens = _pack_texts(texts, _load_tokenizer(model), num_samples, length)
    tokens = tokens.to(device="cpu", dtype=torch.int64).contiguous()
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    rows, length = tokens.shape
    return tokens, {
        "source": source,
        "num_samples": rows,
        "sequence_length": length,
        "seed": seed,
        "sha256": digest,
    }


def check_source(dataset: str) -> None:
    """Refuse, before anything is loaded, a dataset string that cannot be read.

    Raises:
        FileNotFoundError: it names a local file that is absent.
        ValueError: it names something local that is not a file of a kind that is read.
    """
    if is_local_file(dataset):
        if not Path(dataset).is_file():
            raise FileNotFoundError(f"dataset {dataset!r} does not exist")
        return
    looks_local = dataset.startswith((".", "/", "~")) or Path(dataset).exists()
    other_kinds = (".csv", ".tsv", ".md", ".gz", ".safetensors")
    if looks_local or Path(dataset).suffix.lower() in other_kinds:
        raise ValueError(
            f"dataset {dataset!r} is not a file of a kind that is read: {', '.join(READERS)}; pass "
            "strings or token ids for anything else"
        )


def write_tokens(
    model: Any, *, num_samples: int, sequence_length: int, seed: int, batch_size: int
) -> Tensor:
    """Let a causal model sample its own calibration text.

    Sampling is at temperature 1 from the whole vocabulary.

    A row starts with the begin token or, where the tokenizer has a chat template, with the template
    up to the user's first word, so that the model writes whole conversations. End tokens do not
    stop a row. The same model, seed, batch size and machine give the same tokens; the global random
    state is left alone.

    Returns:
        [num_samples, sequence_length] int64.

    Raises:
        ValueError: the model cannot generate, or has no begin token.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(
            f"{type(model).__name__} cannot write its own calibration text: pass dataset= a file, "
            "a list of strings or token ids"
        )
    device = model.get_input_embeddings().weight.device
    start = _start_tokens(model)
    if len(start) >= sequence_length:
        raise ValueError(
            f"sequence_length is {sequence_length}, but rows start with {len(start)} tokens: "
            "use a larger one"
        )
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sequence_length - len(start),
        pad_token_id=start[0],
    )
    rows: list[Tensor] = []
    cuda = [device.index or 0] if device.type == "cuda" else []
    original = model.generation_config
    total = num_samples * sampling.max_new_tokens
    bar = tqdm(total=total, desc="Writing calibration text", unit="token", disable=None)
    try:
        # generate() fills what a call leaves open from here, and an end token would stop the rows.
        model.generation_config = sampling
        with bar, torch.no_grad(), torch.random.fork_rng(cuda):
            torch.manual_seed(seed)

            def tick(ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
                bar.update(len(ids))
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

            while len(rows) < num_samples:
                size = min(batch_size, num_samples - len(rows))
                prompt = torch.tensor(start, device=device).repeat(size, 1)  # [B, P]
                rows += model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=sampling,
                    stopping_criteria=StoppingCriteriaList([tick]),
                ).cpu()
    finally:
        model.generation_config = original
    return torch.stack(rows)


def _longest_row(model: Any) -> int:
    """Return how many tokens a model takes: its positions, less those kept for padding."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return 2**31
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == limit:
            # RoBERTa and its kin count positions from the padding index on.
            return limit - (0 if module.padding_idx is None else module.padding_idx + 1)
    return limit


def _start_tokens(model: Any) -> list[int]:
    tokenizer = _load_tokenizer(model, required=False)
    if tokenizer is not None and tokenizer.chat_template:
        mark = "\N{REPLACEMENT CHARACTER}scalesweep\N{REPLACEMENT CHARACTER}"
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
        return list(tokenizer(text.partition(mark)[0], add_special_tokens=False)["input_ids"])
    for config in (model.generation_config, _text_config(model)):
        for name in ("bos_token_id", "decoder_start_token_id"):
            if isinstance(begin := getattr(config, name, None), int):
                return [begin]
    raise ValueError(
        f"{type(model).__name__} has no begin token (bos_token_id) to write calibration text from: "
        "pass dataset= a file, a list of strings or token ids"
    )


def _check_tokens(tokens: Tensor, model: Any) -> Tensor:
    if (
        tokens.ndim != 2
        or tokens.numel() == 0
        or tokens.dtype not in (torch.int16, torch.int32, torch.int64)
    ):
        raise ValueError(
            f"dataset is a tensor of shape {list(tokens.shape)} and dtype {tokens.dtype}; "
            "expected integer token ids [rows, length]"
        )
    low, high = int(tokens.min()), int(tokens.max())
    size = _text_config(model).vocab_size
    if low < 0 or high >= size:
        raise ValueError(f"token ids span {low}...{high}, outside the vocabulary of {size}")
    return tokens


def _read_texts(dataset: str, seed: int) -> Iterator[str]:
    import datasets

    if is_local_file(dataset):
        check_source(dataset)
        reader = READERS[Path(dataset).suffix.lower()]
        options = {"sample_by": "document"} if reader == "text" else {}
        rows = datasets.load_dataset(reader, data_files=dataset, split="train", **options)
    else:
        name, _, rest = dataset.partition(":")
        config, _, split = rest.partition(":")
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    strings = [
        name for name, kind in rows.features.items() if getattr(kind, "dtype", "") == "string"
    ]
    column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if column is None:
        raise ValueError(
            f"dataset {dataset!r} has columns {list(rows.features)}; it needs a string column "
            "'text'"
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return (rows[i][column] for i in order)


def _pack_texts(texts: Iterable[str], tokenizer: Any, num_samples: int, length: int) -> Tensor:
    """Join texts by the end token; cut rows [rows, length] that start with the begin token."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    if not begin and tokenizer.cls_token_id is not None:
        begin = [tokenizer.cls_token_id]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    body = length - len(begin)
    stream = itertools.chain.from_iterable(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        for text in texts
        if text
    )
    rows: list[list[int]] = []
    while len(rows) < num_samples and len(row := list(itertools.islice(stream, body))) == body:
        rows.append(begin + row)
    if not rows:
        raise ValueError(
            f"dataset has fewer than {body} tokens, one row of sequence_length={length}: "
            "give more text or a smaller sequence_length"
        )
    if len(rows) < num_samples:
        from transformers.utils import logging

        logging.get_logger(__name__).warning(
            f"The calibration data fills {len(rows)} rows of {length} tokens, fewer than "
            f"num_samples={num_samples}; using those."
        )
    return torch.tensor(rows)


def _load_tokenizer(model: Any, *, required: bool = True) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError, KeyError) as error:
        if not required:
            logging.get_logger(__name__).warning(
                f"No tokenizer at {model.name_or_path!r} ({type(error).__name__}): calibration "
                "text starts from the begin token, without a chat template."
            )
            return None
        raise ValueError(
            f"no tokenizer found at {model.name_or_path!r} for the calibration text; save one "
            "beside the model, or pass dataset= token ids"
        ) from error


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()
