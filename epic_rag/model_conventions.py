"""Prompts of embedding models as their authors state them, for models whose files name none.

A sentence-transformers folder may have its prompts in `config_sentence_transformers.json`; these take precedence. Many
older folders, and every remote service, have none: their model cards say what stands before a query and a document, and
without it the vectors are worse and nothing says so. `find_convention` looks the model up by its name. `find_languages`
does the same for the languages that a model was trained on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "CONVENTIONS",
    "LANGUAGES",
    "LANGUAGE_NAMES",
    "MULTILINGUAL",
    "Convention",
    "fill_instruction",
    "find_convention",
    "find_languages",
    "has_instruction",
]

_SEARCH = "Represent this sentence for searching relevant passages: "
_WEB = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True)
class Convention:
    """Prompts of a family of models.

    Attributes:
        family: Name of the family in messages.
        pattern: Regular expression that finds a member's name, in lower case and without its organisation.
        query: Text before a query.
        document: Text before a document.
        source: Where the authors state it.
    """

    family: str
    pattern: str
    query: str = ""
    document: str = ""
    source: str = ""


# The first one whose pattern fits counts, so that a narrow pattern stands before a wide one.
CONVENTIONS: tuple[Convention, ...] = (
    Convention(
        "E5 instruct",
        r"e5-.*instruct",
        f"Instruct: {_WEB}\nQuery: ",
        source="model card of intfloat/multilingual-e5-large-instruct",
    ),
    Convention("E5", r"(^|[-_])e5-", "query: ", "passage: ", "model card of intfloat/multilingual-e5-small"),
    Convention("BGE M3", r"bge-m3", source="model card of BAAI/bge-m3: no instruction"),
    Convention(
        "BGE Chinese",
        r"bge-.*zh",
        "为这个句子生成表示以用于检索相关文章：",  # noqa: RUF001
        source="model card of BAAI/bge-small-zh-v1.5",
    ),
    Convention("BGE", r"bge-(small|base|large)", _SEARCH, source="model card of BAAI/bge-small-en-v1.5"),
    Convention("UAE", r"uae-large", _SEARCH, source="model card of WhereIsAI/UAE-Large-V1"),
    Convention("mxbai", r"mxbai-embed", _SEARCH, source="model card of mixedbread-ai/mxbai-embed-large-v1"),
    Convention(
        "Arctic Embed 2",
        r"arctic-embed(2|.*-v2|.*2\.0)",
        "query: ",
        source="model card of Snowflake/snowflake-arctic-embed-m-v2.0",
    ),
    Convention(
        "Arctic Embed", r"arctic-embed", _SEARCH, source="model card of Snowflake/snowflake-arctic-embed-m-v1.5"
    ),
    Convention(
        "Nomic Embed",
        r"nomic-embed-text",
        "search_query: ",
        "search_document: ",
        "model card of nomic-ai/nomic-embed-text-v1.5",
    ),
    Convention(
        "ModernBERT Embed",
        r"modernbert-embed",
        "search_query: ",
        "search_document: ",
        "model card of nomic-ai/modernbert-embed-base",
    ),
    Convention(
        "Qwen3 Embedding",
        r"qwen3-embedding",
        f"Instruct: {_WEB}\nQuery:",
        source="model card of Qwen/Qwen3-Embedding-0.6B",
    ),
    Convention(
        "GTE Qwen2",
        r"gte-qwen.*instruct",
        f"Instruct: {_WEB}\nQuery: ",
        source="model card of Alibaba-NLP/gte-Qwen2-1.5B-instruct",
    ),
    Convention(
        "EmbeddingGemma",
        r"embedding-?gemma",
        "task: search result | query: ",
        "title: none | text: ",
        "model card of google/embeddinggemma-300m",
    ),
)
MULTILINGUAL = "multilingual"
"""Stands for many languages, in model cards and in `LANGUAGES`."""
# Languages by a pattern of the name, as the model cards of the hub state them; the first one that fits counts.
LANGUAGES: tuple[tuple[str, str], ...] = (
    (
        r"multilingual|[-_]m3\b|labse|arctic-embed(2|.*-v2|.*2\.0)|qwen3-embedding|embedding-?gemma|nomic-embed-text-v2"
        r"|jina-embeddings-v[3-9]|text-embedding-3|embed-v4|gte-qwen|bge-multilingual",
        MULTILINGUAL,
    ),
    (r"(^|[-_])zh([-_]|$)", "zh"),
    (
        r"(^|[-_])(en|english)([-_]|$)|^all-(minilm|mpnet|distilroberta|roberta)|(^|[-_])e5-(small|base|large)"
        r"|^gte-(small|base|large)|^gtr-t5|uae-large|mxbai-embed-(large|xsmall)|arctic-embed|nomic-embed-text"
        r"|modernbert-embed|smollm|potion-(base|retrieval)|^multi-qa-|^msmarco-",
        "en",
    ),
)
LANGUAGE_NAMES = {
    "am": "Amharic", "ar": "Arabic", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan",
    "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian",
    "fa": "Persian", "fi": "Finnish", "fr": "French", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ka": "Georgian",
    "km": "Khmer", "kn": "Kannada", "ko": "Korean", "lo": "Lao", "lt": "Lithuanian", "mk": "Macedonian",
    "ml": "Malayalam", "mr": "Marathi", "my": "Burmese", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian",
    "or": "Odia", "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "si": "Sinhala", "sr": "Serbian", "sv": "Swedish", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
"""English names of languages by their ISO 639-1 codes."""
# Prompts that hold an instruction, which another one can replace.
_INSTRUCTIONS = (
    re.compile(r"(?P<before>^Instruct: )(?P<instruction>.*?)(?P<after>\nQuery: ?$)", re.DOTALL),
    re.compile(r"(?P<before>^task: )(?P<instruction>.*?)(?P<after> \| query: ?$)", re.DOTALL),
)


def find_convention(name: str) -> Convention | None:
    """Return the convention of the model with this name; None if the table has none.

    Args:
        name: A hub name, the name of a folder or of a remote model; organisation and case do not count.
    """
    base = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return next((entry for entry in CONVENTIONS if re.search(entry.pattern, base)), None)


def find_languages(name: str) -> tuple[str, ...]:
    """Return the languages of the model with this name, as ISO 639-1 codes or "multilingual"; none if unknown.

    Args:
        name: See `find_convention`.
    """
    base = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return next(((language,) for pattern, language in LANGUAGES if re.search(pattern, base)), ())


def has_instruction(prompt: str) -> bool:
    """Return whether a query prompt holds an instruction, as those of instruction-tuned models do."""
    return any(form.match(prompt) for form in _INSTRUCTIONS)


def fill_instruction(prompt: str, instruction: str | None) -> str:
    """Return a query prompt with another instruction.

    Args:
        prompt: The model's own prompt.
        instruction: The instruction; None for the prompt's own. A prompt without an instruction is returned as it is:
            such a model was not trained to follow one.
    """
    for form in _INSTRUCTIONS if instruction else ():
        found = form.match(prompt)
        if found:
            return f"{found['before']}{instruction}{found['after']}"
    return prompt
