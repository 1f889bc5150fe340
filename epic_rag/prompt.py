r"""From an instruction, demonstrations and a query to token ids and slot positions.

One template, three renderings of the same demonstrations:

    zero-shot   Instruct: {instruction}\nQuery: {query}{eos}
    text ICL    Instruct: {instruction}\nQuery: {q_1}\nResponse: {d_1}\n ... Query: {query}{eos}
    EPIC        Instruct: {instruction}\nQuery: <f(q_1)>\nResponse: <f(d_1)>\n ... Query: {query}{eos}

A slot `<f(.)>` is one input position, filled with an embedding by `epic_rag.backbone`. All three share their pieces
and their tokenisation, so that strategies differ in nothing else.

Each piece is tokenised on its own and the ids are joined: everything before the last query is then the same ids for
every query (which is what lets a key/value cache be reused), and truncating a text can never touch an instruction, a
slot or the end-of-sequence token, because texts are cut before they are joined.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from epic_rag.errors import ConfigError, PromptError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "STRATEGIES",
    "Batch",
    "EncoderInput",
    "Prefix",
    "PromptBuilder",
    "PromptTemplate",
    "Strategy",
    "check_strings",
    "collate",
    "prefetch",
]

Strategy = Literal["epic", "text", "none"]
LongTexts = Literal["cut", "windows"]
"""Way of encoding a document that is longer than the model reads."""
STRATEGIES: tuple[Strategy, ...] = ("epic", "text", "none")
_PREFIXES_KEPT = 64


@dataclass(frozen=True)
class PromptTemplate:
    """The words around instruction, demonstrations and query.

    Attributes:
        instruction: Line that holds the instruction.
        query: What stands before a query.
        response: What stands before a demonstration's passage.
        end: What ends a demonstration.
        separators: "words" puts `query`, `response` and `end` around slots; "none" puts slots side by side.
        demonstration_instructions: "shared" has one instruction line, before all demonstrations; "each" has one before
            every demonstration and one before the query.

    Raises:
        ConfigError: If the instruction's line cannot be filled in, or another value is unknown.
    """

    instruction: str = "Instruct: {instruction}\n"
    query: str = "Query:"
    response: str = "\nResponse:"
    end: str = "\n"
    separators: Literal["words", "none"] = "words"
    demonstration_instructions: Literal["shared", "each"] = "shared"

    def __post_init__(self) -> None:
        try:
            fits = "\0" in self.instruction.format(instruction="\0")
        except (AttributeError, IndexError, KeyError, ValueError):
            fits = False
        if not fits:
            raise ConfigError(
                f"The template's instruction {self.instruction!r} must have the field {{instruction}} and no other. "
                "Double any other brace."
            )
        if self.separators not in ("words", "none"):
            raise ConfigError(f"Unknown separators {self.separators!r}. Choose words or none.")
        if self.demonstration_instructions not in ("shared", "each"):
            raise ConfigError(
                f"Unknown demonstration_instructions {self.demonstration_instructions!r}. Choose shared or each."
            )

    def to_dict(self) -> dict[str, str]:
        """Return the template as plain values, for `epic.json`."""
        values = asdict(self)
        if self.demonstration_instructions == "shared":
            # Left out, so that checkpoints from before there was a choice keep their fingerprint.
            del values["demonstration_instructions"]
        return values


@dataclass(frozen=True)
class EncoderInput:
    """One row of model input, not padded.

    Attributes:
        ids: Token ids; the id at a slot is a filler whose embedding is replaced.
        slots: Positions of the slots, in the order query, passage, query, passage, ...
        pool_start: First position that mean pooling reads: 0, or the first of the query's own tokens if a prompt
            stands before it.
        is_query: Whether a model with weights of its own for queries reads the row with these.
    """

    ids: tuple[int, ...]
    slots: tuple[int, ...] = ()
    pool_start: int = 0
    is_query: bool = False


@dataclass(frozen=True)
class Prefix:
    """Everything before a query's own tokens: special tokens, instruction, demonstrations, "Query:".

    Attributes:
        ids: Token ids, fillers at the slots.
        slots: Slot positions within `ids`.
        words: Whether there is more than special tokens. A bare query is pooled like a document.
    """

    ids: tuple[int, ...]
    slots: tuple[int, ...] = ()
    words: bool = False


@dataclass(frozen=True)
class Batch:
    """A padded batch.

    Attributes:
        ids: (rows, tokens) int64.
        mask: (rows, tokens) int64, 1 on real tokens.
        pool_mask: (rows, tokens) float32, 1 on the tokens that mean pooling reads.
        slot_rows: (slots,) int64, the row of each slot.
        slot_columns: (slots,) int64, the column of each slot, already shifted for left padding.
        is_query: Whether the rows are queries.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    pool_mask: torch.Tensor
    slot_rows: torch.Tensor
    slot_columns: torch.Tensor
    is_query: bool = False

    def to(self, device: torch.device, *, pinned: bool = False) -> Batch:
        """Return the batch on a device, from pinned memory if asked: it is then copied while the CPU works on."""
        tensors = {name: value for name, value in vars(self).items() if name != "is_query"}
        moved = {
            name: value.pin_memory().to(device, non_blocking=True) if pinned else value.to(device)
            for name, value in tensors.items()
        }
        return replace(self, **moved)


def collate(rows: Sequence[EncoderInput], *, pad_id: int, padding_side: Literal["left", "right"] = "right") -> Batch:
    """Pad rows to one width.

    Args:
        rows: At least one row; all of them queries, or none.
        pad_id: Token id of the padding; masked everywhere.
        padding_side: Where the padding goes.

    Returns:
        The padded batch. Slots are listed row by row, so that slot vectors of shape (slots, dim) are the rows'
        vectors joined.
    """
    import torch

    if len({row.is_query for row in rows}) > 1:
        raise ValueError("A batch has queries and other rows. Put them into batches of their own.")
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    pool_mask = torch.zeros((len(rows), width), dtype=torch.float32)
    slot_rows: list[int] = []
    slot_columns: list[int] = []
    for index, row in enumerate(rows):
        start = width - len(row.ids) if padding_side == "left" else 0
        stop = start + len(row.ids)
        ids[index, start:stop] = torch.tensor(row.ids, dtype=torch.long)
        mask[index, start:stop] = 1
        pool_mask[index, start + row.pool_start : stop] = 1.0
        slot_rows.extend([index] * len(row.slots))
        slot_columns.extend(start + slot for slot in row.slots)
    return Batch(
        ids=ids,
        mask=mask,
        pool_mask=pool_mask,
        slot_rows=torch.tensor(slot_rows, dtype=torch.long),
        slot_columns=torch.tensor(slot_columns, dtype=torch.long),
        is_query=rows[0].is_query,
    )


@dataclass
class PromptBuilder:
    """Turns texts into model input for one tokenizer.

    Args:
        tokenizer: A fast tokenizer.
        template: The words of the prompt.
        append_eos: Whether a row must end with the end-of-sequence token (last-token pooling reads it).
        max_query_tokens: Longest query, its special tokens counted, its prompt not.
        max_document_tokens: Longest document, special tokens counted.
        max_positions: The most positions the model takes; None for no bound.
        max_demonstration_tokens: Longest query or passage of a *text* demonstration.

    Raises:
        PromptError: If the tokenizer has no end-of-sequence token and one is needed.
    """

    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate = field(default_factory=PromptTemplate)
    append_eos: bool = True
    max_query_tokens: int = 512
    max_document_tokens: int = 512
    max_positions: int | None = None
    max_demonstration_tokens: int = 256

    def __post_init__(self) -> None:
        self.start, self.stop = _special_ids(self.tokenizer)
        eos = self.tokenizer.eos_token_id
        if self.append_eos and (not self.stop or self.stop[-1] != eos):
            if eos is None:
                raise PromptError(
                    "Last-token pooling needs an end-of-sequence token, but the tokenizer has none. "
                    "Set `eos_token` in tokenizer_config.json, or load with pooling='mean'."
                )
            self.stop = (*self.stop, int(eos))
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = int(pad) if pad is not None else (self.stop[-1] if self.stop else 0)
        # The filler's own embedding is never read; the end token is one that every vocabulary has.
        self.filler = self.stop[-1] if self.stop else self.pad_id
        self._prefixes: dict[tuple[PromptTemplate, str | None, int, Strategy], Prefix] = {}

    @classmethod
    def from_settings(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        epic: Mapping[str, Any],
        *,
        append_eos: bool,
        limit: int,
        max_positions: int | None,
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
    ) -> PromptBuilder:
        """Make the builder of a checkpoint.

        Args:
            tokenizer: A fast tokenizer.
            epic: Contents of `epic.json`; empty for a folder without it.
            append_eos: Whether a row must end with the end-of-sequence token, if `epic` has no such setting.
            limit: Longest query and document, if `epic` has no such settings.
            max_positions: The most positions the model takes; None for no bound.
            max_query_tokens: Overrides the stored limit.
            max_document_tokens: Overrides the stored limit.

        Raises:
            ConfigError: If a limit is below 1.
            PromptError: See `PromptBuilder`.
            TypeError: If a stored setting has another type.
            ValueError: If a stored limit is not a number.
        """
        template = PromptTemplate(**epic.get("template", {}))
        limits = {"max_query_tokens": max_query_tokens, "max_document_tokens": max_document_tokens}
        chosen = {name: int(epic.get(name, limit)) if given is None else given for name, given in limits.items()}
        for name, value in chosen.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}. Pass 1 or more.")
        return cls(
            tokenizer,
            template,
            append_eos=bool(epic.get("append_eos", append_eos)),
            max_positions=max_positions,
            **chosen,
        )

    def token_ids(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Tokenise texts without special tokens, each cut to `limit` tokens.

        Raises:
            PromptError: If a text is not a string.
        """
        if not texts:
            return []
        check_strings(texts)
        encoded = self.tokenizer(
            # Half a surrogate pair, which broken JSON can hold, is no character: tokenizers refuse it.
            [text.encode("utf-8", "replace").decode("utf-8") for text in texts],
            add_special_tokens=False,
            truncation=limit is not None,
            max_length=limit,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def token_counter(self) -> Callable[[Sequence[str], bool], list[int]]:
        """Return a function of texts and whether they are documents: their lengths in tokens, special ones included.

        It has a tokenizer of its own, as tokenizers are not safe to share between threads.
        """
        own = copy.deepcopy(self)
        special = len(own.start) + len(own.stop)

        def count(texts: Sequence[str], is_document: bool) -> list[int]:
            limit = own.max_document_tokens if is_document else own.max_query_tokens
            return [len(ids) + special for ids in own.token_ids(texts, limit - special)]

        return count

    def documents(self, texts: Sequence[str]) -> list[EncoderInput]:
        """Build inputs of bare texts: special tokens, text, end.

        Returns:
            One row per text, of at most `max_document_tokens` tokens.
        """
        return self._rows(Prefix(ids=self.start), texts, self.max_document_tokens, "a document")

    def symmetric(self, texts: Sequence[str]) -> list[EncoderInput]:
        """Build inputs of bare texts that are compared with each other: read as documents, as long as queries.

        Returns:
            One row per text, of at most `max_query_tokens` tokens.
        """
        return self._rows(Prefix(ids=self.start), texts, self.max_query_tokens, "a text")

    def prefix(
        self,
        instruction: str | None = None,
        *,
        num_slots: int = 0,
        demonstrations: Sequence[tuple[str, str]] = (),
        strategy: Strategy = "epic",
    ) -> Prefix:
        """Build everything that comes before the query's own tokens.

        Args:
            instruction: What to retrieve; None or "" for no instruction line.
            num_slots: Number of demonstrations to leave slots for (strategy "epic").
            demonstrations: Demonstrations as text (strategy "text").
            strategy: "epic", "text" or "none".

        Returns:
            The prefix. With no instruction and no demonstrations it is the special tokens alone, whatever the
            strategy: k = 0 is exactly the zero-shot input.

        Raises:
            PromptError: If the strategy is unknown.
        """
        if strategy not in STRATEGIES:
            raise PromptError(f"Unknown strategy {strategy!r}. Choose one of {', '.join(STRATEGIES)}.")
        if strategy == "text" and demonstrations:
            return self._prefix(instruction, 0, demonstrations, strategy)
        # The same few prompts stand before all queries, and tokenising one costs as much as a query.
        key = (self.template, instruction, num_slots, strategy)
        if key not in self._prefixes:
            if len(self._prefixes) >= _PREFIXES_KEPT:
                self._prefixes.clear()
            self._prefixes[key] = self._prefix(instruction, num_slots, (), strategy)
        return self._prefixes[key]

    def _prefix(
        self,
        instruction: str | None,
        num_slots: int,
        demonstrations: Sequence[tuple[str, str]],
        strategy: Strategy,
    ) -> Prefix:
        template = self.template
        count = {"epic": num_slots, "text": len(demonstrations), "none": 0}[strategy]
        if not instruction and count == 0:
            return Prefix(ids=self.start)
        words = [template.query, template.response, template.end]
        if instruction:
            words.append(template.instruction.format(instruction=instruction))
        query, response, end, *head = (tuple(ids) for ids in self.token_ids(words))
        if template.separators == "none" and strategy == "epic":
            demo_query: tuple[int, ...] = ()
            response = end = ()
        else:
            demo_query = query
        line = head[0] if head else ()
        each = template.demonstration_instructions == "each"
        ids: list[int] = [*self.start, *(() if each else line)]
        slots: list[int] = []
        texts = [" " + text for pair in demonstrations for text in pair] if strategy == "text" else []
        bodies = self.token_ids(texts, self.max_demonstration_tokens)
        for index in range(count):
            ids.extend(line if each else ())
            for part, before in enumerate((demo_query, response)):
                ids.extend(before)
                if strategy == "epic":
                    slots.append(len(ids))
                    ids.append(self.filler)
                else:
                    ids.extend(bodies[2 * index + part])
            ids.extend(end)
        ids.extend((*line, *query) if each else query)
        return Prefix(ids=tuple(ids), slots=tuple(slots), words=True)

    def queries(self, prefix: Prefix, texts: Sequence[str]) -> list[EncoderInput]:
        """Build inputs of queries behind a prefix.

        Args:
            prefix: Everything before the query's own tokens.
            texts: The queries.

        Returns:
            One row per text. Only the query's own tokens are ever cut.

        Raises:
            PromptError: If the prefix leaves no room for a query, or a text is not a string.
        """
        return self._rows(prefix, texts, self.max_query_tokens, "a query", is_query=True)

    def queries_behind_texts(
        self, instruction: str | None, demonstrations: Sequence[Sequence[tuple[str, str]]], texts: Sequence[str]
    ) -> list[EncoderInput]:
        """Build inputs of queries behind demonstrations as texts.

        Args:
            instruction: Instruction of all queries; None for none.
            demonstrations: Each query's (query, passage) pairs.
            texts: The queries.

        Returns:
            One row per text.

        Raises:
            PromptError: If a prompt leaves no room for its query, or a text is not a string.
        """
        prefixes: dict[tuple[tuple[str, str], ...], Prefix] = {}
        rows = []
        for shown, text in zip(demonstrations, texts, strict=True):
            key = tuple(shown)
            if key not in prefixes:
                prefixes[key] = self.prefix(instruction, demonstrations=shown, strategy="text")
            rows.extend(self.queries(prefixes[key], [text]))
        return rows

    def _rows(
        self, prefix: Prefix, texts: Sequence[str], limit: int, what: str, *, is_query: bool = False
    ) -> list[EncoderInput]:
        # The space belongs to the query's first word, as it would in one continuous text.
        texts = [f" {text}" if isinstance(text, str) else text for text in texts] if prefix.words else texts
        room = self._room(prefix, limit, what)
        pool_start = len(prefix.ids) if prefix.words else 0
        rows = []
        for ids in self.token_ids(texts, room):
            row = (*prefix.ids, *ids, *self.stop)
            if len(row) == pool_start:
                # An empty text and a tokenizer without special tokens: there must be one position to pool.
                row = (*row, self.filler)
            rows.append(EncoderInput(row, slots=prefix.slots, pool_start=pool_start, is_query=is_query))
        return rows

    def with_prefix(self, prefix: Prefix, rows: Sequence[EncoderInput]) -> list[EncoderInput]:
        """Put the queries of rows behind another prefix, without tokenising them again.

        Args:
            prefix: The new prefix; must have words.
            rows: Output of `queries` for a prefix with words.

        Raises:
            PromptError: If the prefix leaves no room for a query.
        """
        room, stop = self._room(prefix, self.max_query_tokens, "a query"), len(self.stop)
        inputs = []
        for row in rows:
            ids = (*prefix.ids, *row.ids[row.pool_start : len(row.ids) - stop][:room], *self.stop)
            ids = ids if len(ids) > len(prefix.ids) else (*ids, self.filler)
            inputs.append(EncoderInput(ids, slots=prefix.slots, pool_start=len(prefix.ids), is_query=True))
        return inputs

    def _room(self, prefix: Prefix, limit: int, what: str) -> int:
        """Return the number of tokens that are left for a text behind a prefix."""
        room = limit - len(self.start) - len(self.stop)
        if self.max_positions is not None:
            room = min(room, self.max_positions - len(self.stop) - len(prefix.ids))
        if room < 1:
            raise PromptError(
                f"No room for {what}: the limit is {limit} tokens, the model takes {self.max_positions}, the prompt "
                f"before it has {len(prefix.ids)}. Use fewer demonstrations or a shorter instruction."
            )
        return room

    def settings(self) -> dict[str, Any]:
        """Return the settings that are part of the fingerprint."""
        return {
            "template": self.template.to_dict(),
            "append_eos": self.append_eos,
            "max_query_tokens": self.max_query_tokens,
            "max_document_tokens": self.max_document_tokens,
        }


def check_strings(texts: Sequence[object]) -> None:
    """Check that all texts are strings.

    Raises:
        PromptError: If one is not.
    """
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise PromptError(f"Text {number} of {len(texts)} is {text!r}, not a string. Convert it or leave it out.")


def prefetch(
    tokenise: Callable[[Sequence[str]], list[EncoderInput]], texts: Sequence[str], block: int
) -> Iterator[list[EncoderInput]]:
    """Tokenise texts block by block; a thread makes the next block while the caller embeds this one.

    Args:
        tokenise: From texts to rows; the tokenizer releases the GIL.
        texts: All texts.
        block: Texts in a block.

    Yields:
        Rows of each block in order; one empty list for no texts.
    """
    if len(texts) <= block:
        yield tokenise(texts)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1, thread_name_prefix="epic-rag-tokenizer") as pool:
        pending = pool.submit(tokenise, texts[:block])
        for start in range(block, len(texts), block):
            rows = pending.result()
            pending = pool.submit(tokenise, texts[start : start + block])
            yield rows
        yield pending.result()


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a tokenizer puts before and after a text."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()
