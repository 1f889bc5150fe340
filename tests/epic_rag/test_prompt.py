"""One template, three renderings: token ids, slots and cuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from epic_rag import ConfigError, PromptError
from epic_rag.prompt import STRATEGIES, EncoderInput, PromptBuilder, PromptTemplate, collate, prefetch
from tests.conftest import make_tokenizer

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def word_piece() -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer: [CLS] and [SEP] around a text, no end-of-sequence token."""
    words = ["instruct", "query", "response", ":", "find", "it", "the", "quick", "brown", "fox", "a", "hello"]
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def with_bos() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that puts a token before a text and none after it."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 1)]
    )
    return tokenizer


BYTES = make_tokenizer()
TOKENIZERS = {"bytes": BYTES, "bos": with_bos(), "wordpiece": word_piece()}

# Text that tokenizers stumble over: spaces, line breaks, other scripts, the prompt's own words, special tokens.
texts = st.text(max_size=40) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "Query:",
        "\nResponse: x\nQuery:",
        "<eos>",
        "[SEP] a",
        "日本語",
        "🙂🙂",
        "e\u0301",
        "a" * 200,
        "\ud800",
    ]
)
pairs = st.lists(st.tuples(texts, texts), max_size=4)
kinds = st.sampled_from(sorted(TOKENIZERS))


def builder(kind: str = "bytes", *, template: PromptTemplate | None = None, **limits: int | None) -> PromptBuilder:
    return PromptBuilder(
        TOKENIZERS[kind],
        template or PromptTemplate(),
        append_eos=kind != "wordpiece",
        **{"max_query_tokens": 24, **limits},
    )


def own_ids(made: PromptBuilder, text: str) -> tuple[int, ...]:
    return tuple(made.token_ids([text])[0])


def test_the_three_renderings_word_for_word() -> None:
    made = builder(max_query_tokens=100)
    demonstrations = [("the quick fox", "jumps over"), ("a window", "cats watch it")]

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(BYTES(text)["input_ids"])

    zero = made.queries(made.prefix("find it"), ["hello"])[0]
    assert zero.ids == (*tokens("Instruct: find it\nQuery: hello"), 0)
    assert zero.slots == ()
    text = made.queries(made.prefix("find it", demonstrations=demonstrations, strategy="text"), ["hello"])[0]
    written = (
        "Instruct: find it\nQuery: the quick fox\nResponse: jumps over\n"
        "Query: a window\nResponse: cats watch it\nQuery: hello"
    )
    assert text.ids == (*tokens(written), 0)
    epic = made.queries(made.prefix("find it", num_slots=2), ["hello"])[0]
    one = (*tokens("Query:"), 0, *tokens("\nResponse:"), 0, *tokens("\n"))
    assert epic.ids == (*tokens("Instruct: find it\n"), *one, *one, *tokens("Query: hello"), 0)
    bare = made.queries(made.prefix(), ["hello"])[0]
    assert bare.ids == (*tokens("hello"), 0)
    assert made.documents(["hello"])[0] == replace(bare, is_query=False)
    assert made.symmetric(["hello"]) == made.documents(["hello"])
    assert all(row.is_query for row in (zero, text, epic, bare))


def test_an_instruction_for_each_demonstration() -> None:
    each = PromptTemplate(demonstration_instructions="each")
    made, shared = builder(template=each, max_query_tokens=100), builder(max_query_tokens=100)

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(BYTES(text)["input_ids"])

    line = tokens("Instruct: find it\n")
    epic = made.queries(made.prefix("find it", num_slots=2), ["hello"])[0]
    one = (*line, *tokens("Query:"), 0, *tokens("\nResponse:"), 0, *tokens("\n"))
    assert epic.ids == (*one, *one, *line, *tokens("Query: hello"), 0)
    assert [epic.ids[slot] for slot in epic.slots] == [0] * 4
    pairs = [("the quick fox", "jumps over")]
    text = made.queries(made.prefix("find it", demonstrations=pairs, strategy="text"), ["hello"])[0]
    written = "Instruct: find it\nQuery: the quick fox\nResponse: jumps over\nInstruct: find it\nQuery: hello"
    assert text.ids == (*tokens(written), 0)
    # Without demonstrations, or without an instruction, there is no difference.
    assert made.prefix("find it") == shared.prefix("find it")
    assert made.prefix(None, num_slots=2) == shared.prefix(None, num_slots=2)
    # At its default the setting is not part of the template's record, nor of a fingerprint made from it.
    assert "demonstration_instructions" not in PromptTemplate().to_dict()
    assert PromptTemplate(**each.to_dict()) == each  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Unknown demonstration_instructions 'all'. Choose shared or each"):
        PromptTemplate(demonstration_instructions="all")  # type: ignore[arg-type]


@PROPERTY
@given(kind=kinds, instruction=texts, query=texts, k=st.integers(0, 6), limit=st.integers(4, 40))
def test_truncation_cuts_the_querys_own_tokens_and_nothing_else(
    kind: str, instruction: str, query: str, k: int, limit: int
) -> None:
    made = builder(kind, max_query_tokens=limit)
    prefix = made.prefix(instruction, num_slots=k)
    row = made.queries(prefix, [query])[0]
    room = limit - len(made.start) - len(made.stop)
    own = own_ids(made, f" {query}" if prefix.words else query)[:room]
    assert row.ids == (*prefix.ids, *own, *made.stop)
    assert row.pool_start == (len(prefix.ids) if prefix.words else 0)
    assert made.append_eos is (row.ids[-1] == TOKENIZERS[kind].eos_token_id)


@PROPERTY
@given(kind=kinds, text=texts, limit=st.integers(3, 40))
def test_a_document_is_its_own_tokens_between_the_special_ones(kind: str, text: str, limit: int) -> None:
    made = builder(kind, max_document_tokens=limit)
    row = made.documents([text])[0]
    room = limit - len(made.start) - len(made.stop)
    assert row == EncoderInput((*made.start, *own_ids(made, text)[:room], *made.stop))


@PROPERTY
@given(kind=kinds, instruction=st.none() | texts, k=st.integers(0, 8), separators=st.sampled_from(["words", "none"]))
def test_slots_hold_fillers_and_are_two_a_demonstration(
    kind: str, instruction: str | None, k: int, separators: str
) -> None:
    made = builder(kind, template=PromptTemplate(separators=separators))  # type: ignore[arg-type]
    prefix = made.prefix(instruction, num_slots=k)
    assert len(prefix.slots) == 2 * k
    assert all(prefix.ids[slot] == made.filler for slot in prefix.slots)
    assert list(prefix.slots) == sorted(set(prefix.slots))
    if separators == "none":
        assert [b - a for a, b in zip(prefix.slots, prefix.slots[1:], strict=False)] == [1] * max(0, 2 * k - 1)
    rows = made.queries(prefix, ["hello", "the quick brown fox " * 20])
    assert all(row.slots == prefix.slots for row in rows)


@PROPERTY
@given(kind=kinds, instruction=st.none() | texts, query=texts, demonstrations=pairs)
def test_no_demonstrations_is_the_zero_shot_input_whatever_the_strategy(
    kind: str, instruction: str | None, query: str, demonstrations: list[tuple[str, str]]
) -> None:
    made = builder(kind)
    zero_shot = made.queries(made.prefix(instruction), [query])
    for strategy in STRATEGIES:
        assert made.queries(made.prefix(instruction, strategy=strategy), [query]) == zero_shot
    # "none" shows nothing, whatever it is given.
    none = made.prefix(instruction, num_slots=3, demonstrations=demonstrations, strategy="none")
    assert made.queries(none, [query]) == zero_shot


@PROPERTY
@given(kind=kinds, instruction=texts.filter(bool), query=texts, demonstrations=pairs)
def test_the_renderings_share_instruction_and_query_tokens(
    kind: str, instruction: str, query: str, demonstrations: list[tuple[str, str]]
) -> None:
    made = builder(kind)
    k = len(demonstrations)
    head = (*made.start, *own_ids(made, f"Instruct: {instruction}\n"))
    tail = (*own_ids(made, "Query:"), *own_ids(made, f" {query}")[: 24 - len(made.start) - len(made.stop)], *made.stop)
    rows = [
        made.queries(made.prefix(instruction, num_slots=k, demonstrations=demonstrations, strategy=strategy), [query])[
            0
        ]
        for strategy in STRATEGIES
    ]
    for row in rows:
        assert row.ids[: len(head)] == head
        assert row.ids[len(row.ids) - len(tail) :] == tail
        assert row.ids[row.pool_start :] == tail[len(own_ids(made, "Query:")) :]


@PROPERTY
@given(kind=kinds, instruction=texts, demonstrations=pairs)
def test_epic_is_the_text_rendering_with_each_text_one_filler(
    kind: str, instruction: str, demonstrations: list[tuple[str, str]]
) -> None:
    made = builder(kind, max_query_tokens=24)
    epic = made.prefix(instruction, num_slots=len(demonstrations))
    text = made.prefix(instruction, demonstrations=demonstrations, strategy="text")
    bodies = [own_ids(made, f" {part}") for pair in demonstrations for part in pair]
    written: list[int] = []
    slots = iter(bodies)
    for position, token in enumerate(epic.ids):
        written.extend(next(slots) if position in epic.slots else (token,))
    assert tuple(written) == text.ids
    assert text.slots == ()


def test_a_long_demonstration_is_cut_as_text_and_free_as_a_vector() -> None:
    made = builder()
    long = "word " * 5000
    one, other = (made.prefix("x", demonstrations=[(text, "short")], strategy="text") for text in (long, long + "more"))
    assert one == other
    assert len(one.ids) < 256 + 40
    assert len(made.prefix("x", num_slots=1).ids) < 40


def test_text_is_tokenised_once_and_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("decoded")

    tokenizer = make_tokenizer()
    for name in ("decode", "batch_decode", "convert_tokens_to_string", "_decode"):
        monkeypatch.setattr(tokenizer, name, refuse)
    made = PromptBuilder(tokenizer, max_query_tokens=7, max_document_tokens=7)
    # Cut in the middle of a character of four bytes: decoding and encoding again would give other tokens.
    text = "🙂" * 10
    whole = tuple(BYTES(text)["input_ids"])
    assert made.documents([text])[0].ids == (*whole[:6], 0)
    assert BYTES(BYTES.decode(whole[:6]))["input_ids"] != list(whole[:6])
    spaced = tuple(BYTES(" " + text)["input_ids"])
    prefix = made.prefix("find", num_slots=1)
    assert made.queries(prefix, [text])[0].ids == (*prefix.ids, *spaced[:6], 0)


def test_a_cut_leaves_no_trace_in_the_tokenizer() -> None:
    made = builder(max_query_tokens=5)
    long = "the quick brown fox jumps over the lazy dog"
    before = made.token_ids([long])
    made.queries(made.prefix("x"), [long])
    assert made.token_ids([long]) == before
    assert len(before[0]) > 5


@pytest.mark.parametrize(
    ("kind", "start", "stop", "filler"), [("bytes", (), (0,), 0), ("bos", (1,), (0,), 0), ("wordpiece", (2,), (3,), 3)]
)
def test_special_tokens_are_found(kind: str, start: tuple[int, ...], stop: tuple[int, ...], filler: int) -> None:
    made = builder(kind)
    assert (made.start, made.stop, made.filler) == (start, stop, filler)


def test_a_tokenizer_that_ends_texts_itself_gets_no_second_end() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 0)]
    )
    assert PromptBuilder(tokenizer).stop == (0,)
    assert PromptBuilder(tokenizer).documents(["a"])[0].ids[-2] != 0


def test_last_token_pooling_needs_an_end_token() -> None:
    with pytest.raises(PromptError, match=r"needs an end-of-sequence token.* pooling='mean'"):
        PromptBuilder(word_piece(), append_eos=True)


def test_padding_falls_back_to_the_end_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert PromptBuilder(tokenizer).pad_id == 0
    assert PromptBuilder(tokenizer, append_eos=False).pad_id == 0


@pytest.mark.parametrize("instruction", [None, "", "find"])
def test_there_is_always_something_to_pool(instruction: str | None) -> None:
    # No special tokens at all: an empty text has no token of its own.
    tokenizer = make_tokenizer()
    made = PromptBuilder(tokenizer, append_eos=False)
    for row in (made.documents([""])[0], made.queries(made.prefix(instruction), [""])[0]):
        assert len(row.ids) > row.pool_start
        assert collate([row], pad_id=1).pool_mask.sum() >= 1


@pytest.mark.parametrize(
    ("make", "limit", "positions", "before"),
    [
        (lambda made: made.queries(made.prefix("find it", num_slots=20), ["a"]), 24, 60, 223),
        (lambda made: made.queries(made.prefix("the quick brown fox " * 30), ["a"]), 24, 60, 0),
        (lambda made: made.documents(["a"]), 1, 60, 0),
        (lambda made: made.queries(made.prefix(), ["a"]), 1, 60, 0),
    ],
    ids=["slots", "instruction", "document", "query"],
)
def test_no_room_names_the_numbers_and_the_remedy(
    make: Callable[[PromptBuilder], object], limit: int, positions: int, before: int
) -> None:
    made = builder(max_query_tokens=limit, max_document_tokens=limit, max_positions=positions)
    with pytest.raises(
        PromptError, match=rf"limit is {limit} tokens, .* takes {positions}, .*Use fewer demonstr"
    ) as caught:
        make(made)
    if before:
        assert f"before it has {len(made.prefix('find it', num_slots=20).ids)}." in str(caught.value)


@PROPERTY
@given(kind=kinds, k=st.integers(0, 3), text=texts, positions=st.integers(70, 110))
def test_no_row_exceeds_the_models_positions(kind: str, k: int, text: str, positions: int) -> None:
    made = builder(kind, max_query_tokens=512, max_document_tokens=512, max_positions=positions)
    for row in (made.queries(made.prefix("find it", num_slots=k), [text * 99])[0], made.documents([text * 99])[0]):
        assert len(row.ids) <= positions
        assert row.ids[-1] == made.stop[-1]
    full = [*made.queries(made.prefix("find it", num_slots=k), ["a " * 200]), *made.documents(["a " * 200])]
    assert [len(row.ids) for row in full] == [positions, positions]


def test_an_unknown_strategy_lists_the_known_ones() -> None:
    with pytest.raises(PromptError, match=r"Unknown strategy 'bogus'. Choose one of epic, text, none"):
        builder().prefix("x", strategy="bogus")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["a"]])
def test_what_is_no_text_is_named(bad: object) -> None:
    made = builder()
    calls: list[Callable[[Sequence[str]], object]] = [
        made.documents,
        lambda items: made.queries(made.prefix("x"), items),
        made.token_ids,
    ]
    for call in calls:
        with pytest.raises(PromptError, match=r"Text 2 of 3 is .*, not a string"):
            call(["a", bad, "c"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "line", ["no field", "{other}", "{instruction", "{0}", "{instruction} {other}", "{instruction.x}"]
)
def test_a_template_that_cannot_be_filled_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=r"must have the field \{instruction\} and no other"):
        PromptTemplate(instruction=line)


def test_a_template_may_hold_braces_and_so_may_an_instruction() -> None:
    made = builder(template=PromptTemplate(instruction="{{task}} {instruction}|"))
    assert made.prefix("{x} {instruction}").ids[: len(own_ids(made, "{task} {x} {instruction}|"))] == own_ids(
        made, "{task} {x} {instruction}|"
    )
    with pytest.raises(ConfigError, match=r"Unknown separators 'commas'. Choose words or none"):
        PromptTemplate(separators="commas")  # type: ignore[arg-type]


COLLATE_PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)

rows_of_input = st.lists(
    st.integers(1, 12).flatmap(
        lambda size: st.builds(
            EncoderInput,
            ids=st.lists(st.integers(2, 99), min_size=size, max_size=size).map(tuple),
            slots=st.lists(st.integers(0, size - 1), unique=True, max_size=4).map(lambda slots: tuple(sorted(slots))),
            pool_start=st.integers(0, size - 1),
        )
    ),
    min_size=1,
    max_size=6,
)


@COLLATE_PROPERTY
@given(rows=rows_of_input, side=st.sampled_from(["left", "right"]))
def test_collate_pads_on_the_given_side_and_moves_slots_along(rows: list[EncoderInput], side: str) -> None:
    batch = collate(rows, pad_id=1, padding_side=side)  # type: ignore[arg-type]
    width = max(len(row.ids) for row in rows)
    assert batch.ids.shape == batch.mask.shape == batch.pool_mask.shape == (len(rows), width)
    at = list(zip(batch.slot_rows.tolist(), batch.slot_columns.tolist(), strict=True))
    for index, row in enumerate(rows):
        kept = batch.mask[index].bool()
        assert tuple(batch.ids[index][kept].tolist()) == row.ids
        assert set(batch.ids[index][~kept].tolist()) <= {1}
        real = kept.nonzero().flatten()
        assert (int(real[0]) == 0) if side == "right" else (int(real[-1]) == width - 1)
        assert batch.pool_mask[index][kept].tolist() == [float(n >= row.pool_start) for n in range(len(row.ids))]
        assert batch.pool_mask[index][~kept].sum() == 0
        columns = [column for line, column in at if line == index]
        assert [column - int(real[0]) for column in columns] == list(row.slots)
    assert [line for line, _ in at] == [index for index, row in enumerate(rows) for _ in row.slots]


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate([EncoderInput((1, 2), (0,), is_query=True)], pad_id=0).to(torch.device("meta"))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert batch.is_query


def test_queries_and_documents_are_batches_of_their_own() -> None:
    with pytest.raises(ValueError, match="A batch has queries and other rows"):
        collate([EncoderInput((1,)), EncoderInput((1,), is_query=True)], pad_id=0)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 9])
def test_blocks_are_made_ahead_in_order(count: int) -> None:
    made: list[int] = []

    def make(texts: Sequence[str]) -> list[EncoderInput]:
        made.append(len(texts))
        return [EncoderInput((int(text),)) for text in texts]

    seen = []
    for number, rows in enumerate(prefetch(make, [str(index) for index in range(count)], 3)):
        seen += [row.ids[0] for row in rows]
        assert len(made) <= number + 2  # one block ahead, no more
    assert seen == list(range(count))
    assert sum(made) == count


def test_a_text_that_cannot_be_tokenised_is_told_from_the_thread() -> None:
    def make(texts: Sequence[str]) -> list[EncoderInput]:
        raise PromptError(f"no: {texts[0]}")

    with pytest.raises(PromptError, match="no: a"):
        list(prefetch(make, ["a", "b"], 1))
