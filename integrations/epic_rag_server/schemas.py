"""The wire contract of requests as pydantic models: OpenAI's, TEI's and Cohere's shapes, search, banks.

Unknown fields are refused, so that a misspelt option is an error and not a default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from epic_rag_server.errors import ApiError

__all__ = [
    "MAX_ITEMS",
    "BankRequest",
    "CohereEmbedRequest",
    "EmbeddingsRequest",
    "EvaluationRequest",
    "Example",
    "ExamplesRequest",
    "NoFields",
    "PromptFields",
    "RerankRequest",
    "Role",
    "SearchQuery",
    "TeiEmbedRequest",
    "TeiRerankRequest",
    "parse",
]

MAX_ITEMS = 2048
"""Most texts of a request, as in OpenAI's API."""
MAX_CHARACTERS = 1_000_000
_MAX_QUERY = 20_000
_MAX_CONTEXT = 200
_IDS = (
    "Token ids are not supported, because every model has its own vocabulary. Send texts; in LangChain's "
    "OpenAIEmbeddings, set check_embedding_ctx_length=False."
)

Role = Literal["query", "document", "passage", "search_query", "search_document"]


def _texts(value: Any) -> list[str]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items:
        raise ValueError("It must be a string or a list of strings that is not empty")
    if any(isinstance(item, int) for item in items) or any(isinstance(item, list) for item in items):
        raise ValueError(_IDS)
    if not all(isinstance(item, str) for item in items):
        raise ValueError("Every item must be a string")
    if len(items) > MAX_ITEMS:
        raise ValueError(f"There are {len(items)} items. Send at most {MAX_ITEMS} at a time")
    if any(len(item) > MAX_CHARACTERS for item in items):
        raise ValueError(f"A text is longer than {MAX_CHARACTERS:,} characters. Split it")
    return items


def _documents(value: Any) -> list[str]:
    if isinstance(value, list):
        value = [item["text"] if isinstance(item, dict) and list(item) == ["text"] else item for item in value]
    return _texts(value)


def _patterns(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_texts)]
Query = Annotated[str, StringConstraints(max_length=_MAX_QUERY, strip_whitespace=True, min_length=1)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=500)]
Patterns = Annotated[list[Pattern], BeforeValidator(_patterns), Field(max_length=32)]
Passage = Annotated[str, StringConstraints(max_length=100_000, strip_whitespace=True, min_length=1)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class PromptFields(_Request):
    """Fields of a query's prompt, as in `epic_rag.QueryPrompt`; `bank` is a name."""

    task: str | None = None
    instruction: str | None = Field(default=None, max_length=_MAX_QUERY)
    bank: str | None = None
    num_demonstrations: int | None = Field(default=None, ge=0)


class EmbeddingsRequest(PromptFields):
    """`POST /v1/embeddings` of OpenAI, and the role and the prompt of queries."""

    input: Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = None
    input_type: Role | None = None


class TeiEmbedRequest(_Request):
    """`POST /embed` of text-embeddings-inference."""

    inputs: Texts
    truncate: Literal[True] | None = None
    truncation_direction: Literal["Right", "right"] = "Right"
    prompt_name: str | None = None
    normalize: Literal[True] | None = None
    dimensions: int | None = Field(default=None, ge=1)


class CohereEmbedRequest(PromptFields):
    """`POST /v2/embed` of Cohere."""

    texts: Texts
    input_type: Role
    model: str | None = None
    embedding_types: list[Literal["float", "base64"]] | None = Field(default=None, min_length=1)
    output_dimension: int | None = Field(default=None, ge=1)
    truncate: Literal["END"] = "END"


class RerankRequest(PromptFields):
    """`POST /v1/rerank` of Cohere and Jina."""

    query: Query
    documents: Annotated[list[str], BeforeValidator(_documents)]
    model: str | None = None
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = False


class TeiRerankRequest(_Request):
    """`POST /rerank` of text-embeddings-inference."""

    query: Query
    texts: Texts
    raw_scores: bool = False
    return_text: bool = False
    truncate: Literal[True] | None = None
    truncation_direction: Literal["Right", "right"] = "Right"


class SearchQuery(PromptFields):
    """`POST /v1/search`; `path`, `where` and `since` as the options of `epic-rag query`."""

    query: Query
    index: str | None = None
    top_k: int = Field(default=10, ge=1, le=200)
    mode: Literal["dense", "hybrid", "keyword"] = "hybrid"
    path: Patterns = []
    where: Patterns = []
    since: str | None = Field(default=None, max_length=50)
    collapse: bool = True
    per_file: int | None = Field(default=None, ge=0)
    min_score: float | None = Field(default=None, allow_inf_nan=False)
    before: int = Field(default=0, ge=0, le=_MAX_CONTEXT)
    after: int = Field(default=0, ge=0, le=_MAX_CONTEXT)
    full_section: bool = False


class Example(_Request):
    """A query and a passage that answers it, or does not if `relevant` is false."""

    query: Annotated[str, StringConstraints(max_length=_MAX_QUERY, strip_whitespace=True, min_length=1)]
    passage: Passage
    relevant: bool = True


class ExamplesRequest(_Request):
    """`POST /v1/banks/{name}/examples`."""

    examples: list[Example] = Field(min_length=1, max_length=1000)


class BankRequest(_Request):
    """`POST /v1/banks`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    task: str | None = None
    instruction: str | None = Field(default=None, max_length=_MAX_QUERY)
    examples: list[Example] = Field(default=[], max_length=1000)


class EvaluationRequest(_Request):
    """`POST /v1/banks/{name}/evaluate`; None for the first index."""

    index: str | None = None


class NoFields(_Request):
    """A request without fields."""


Parsed = TypeVar("Parsed", bound=_Request)


def parse(model: type[Parsed], body: bytes | dict[str, Any]) -> Parsed:
    """Parse the body of a request, or fields from elsewhere.

    Raises:
        ApiError: 400 with the first wrong field.
    """
    try:
        return model.model_validate(body) if isinstance(body, dict) else model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))[:80] or None
        fact = first["msg"].removeprefix("Value error, ").rstrip(".")
        if first["type"] == "json_invalid":
            raise ApiError(400, f"The body is not JSON: {fact.partition(': ')[2] or fact}.", code="json") from None
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(model.model_fields))
            raise ApiError(400, f"Unknown field {place}. Known are {known}.", param=place, code="unknown") from None
        message = f"{place}: {fact}." if place else f"{fact}."
        raise ApiError(400, message, param=place, code=first["type"]) from None
