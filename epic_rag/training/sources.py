"""Where the training files of the shipped recipes come from, for the model card."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SOURCES", "Source"]


@dataclass(frozen=True)
class Source:
    """A training file.

    Attributes:
        content: What a row is.
        origin: Where the texts come from.
        licence: Licence of the texts, as their publisher states it.
    """

    content: str
    origin: str
    licence: str


_MANUALS = "217 documentation packages of Debian 12 main"
_EACH_ITS_OWN = (
    "each package's own: BSD, MIT, Apache, PSF, PostgreSQL, GPL, LGPL, MPL, CC BY-SA, GFDL without invariant sections"
)
_NEWSGROUPS = "20 Newsgroups, training part of the split by date"

SOURCES = {
    "acl_title_abstract": Source(
        "paper title → abstract", "ACL Anthology", "CC BY 4.0 from 2016 on, CC BY-NC-SA 3.0 before"
    ),
    "climate_fever": Source("claim → evidence sentence, with hard negatives", "Climate-FEVER", "not stated"),
    "coco_captions_val2017": Source("caption → caption of the same picture", "MS COCO val2017", "CC BY 4.0"),
    "debian_descriptions": Source("short → long package description", "Debian 12 package metadata", "free"),
    "docs_questions": Source("templated question → documentation section", _MANUALS, _EACH_ITS_OWN),
    "docs_sections": Source("heading path → documentation section", _MANUALS, _EACH_ITS_OWN),
    "foldoc": Source("computing term → definition", "Free On-line Dictionary of Computing", "GFDL"),
    "imdb_sentiment": Source("review → sentiment", "Large Movie Review Dataset, training part", "research use"),
    "medquad": Source("medical question → answer", "MedQuAD", "CC BY 4.0"),
    "newsgroup_same_topic": Source("message → message of the topic", _NEWSGROUPS, "public"),
    "newsgroup_topic": Source("message → name of its topic", _NEWSGROUPS, "public"),
    "nl2bash": Source("description → shell command", "NL2Bash", "MIT"),
    "python_docstring_code": Source(
        "first docstring paragraph → Python function", "48 PyPI packages", "BSD, MIT, Apache-2.0"
    ),
    "scitldr": Source("one-sentence summary → abstract", "SciTLDR-A", "Apache-2.0"),
    "snips_intent": Source("command → intent", "SNIPS", "CC0"),
    "snips_same_intent": Source("command → command with the intent", "SNIPS", "CC0"),
    "squad_sentence": Source(
        "question → sentence with the answer, lower-cased", "SQuAD 1.1, nqg split", "CC BY-SA 4.0"
    ),
    "tldr_pages": Source("description → command", "tldr-pages", "CC BY 4.0"),
    "wiki_title_passage": Source("article title → passage", "Wikipedia, sample of 2WikiMultiHop", "CC BY-SA"),
    "wikitablequestions": Source("question → table as text", "WikiTableQuestions", "CC BY-SA 4.0"),
    "wordnet_gloss": Source("words of a synset → gloss", "WordNet 3.0", "WordNet licence"),
}
