"""Source code, cut by its syntax: functions and classes whole where they fit, their names for headings.

tree-sitter reads some fifty languages, broken code included. Without it, and for other languages, blank lines and
indentation decide.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from epic_rag_chroma.document import Break, Document, Scope, clean_title
from epic_rag_chroma.formats.grammars import LANGUAGES, query_of
from epic_rag_chroma.structure import code

if TYPE_CHECKING:
    from tree_sitter import Language, Node, Query, Tree

__all__ = ["note_missing_parser", "read"]

logger = logging.getLogger(__name__)

_PACKAGE = "tree_sitter_language_pack"
# Definitions in definitions deeper than this are not told apart; nobody writes that by hand.
_MAX_DEPTH = 8
_MAX_TITLE = 200
_MAX_ERRORS = 5000
# Nodes that hold nothing but a definition and what belongs to it: decorators, `export`, template parameters.
_WRAPPERS = re.compile(
    r"decorated_definition|export_statement|ambient_declaration|template_declaration|type_declaration"
    r"|lexical_declaration|variable_declaration|expression_statement|statement|definition|type_system_definition"
)
_BESIDE = re.compile("comment|decorator|parameters|modifier")
# Nodes before a definition that belong to it.
_LEADING = re.compile(r".*comment.*|attribute_item|attribute|annotation|marker_annotation|pragma|haddock")
# Nodes that have no structure to cut at.
_OPAQUE = re.compile(r".*(comment|string|heredoc|template_literal|raw_text|char_literal|pod).*")
_MODIFIERS = re.compile(r"[\w\s]*")
# Languages in which a function may be written as several definitions, one for each pattern.
_BY_CLAUSES = frozenset({"elixir", "erlang", "haskell"})
_WORD = re.compile(r"[\w.:$@~!?*+/<>=-]+")


@cache
def note_missing_parser() -> None:
    """Say once if the package that cuts source code by its syntax is not installed."""
    if importlib.util.find_spec(_PACKAGE) is None:
        logger.warning(
            "source code is cut by blank lines and indentation: cutting it by its syntax needs "
            "tree-sitter-language-pack, which is not installed; run `pip install 'epic-rag[files]'`"
        )


def read(lines: list[str], language: str) -> Document:
    """Read source code.

    Args:
        lines: The file's lines.
        language: What `kinds.language_of` calls it.
    """
    document = code(lines)
    tools = _tools(language)
    if tools is None:
        return document
    from tree_sitter import Parser

    tree = Parser(tools[0]).parse("\n".join(lines).encode("utf-8", "replace"))
    if _is_garbage(tree):
        return document
    opaque, leading = _opaque(tree, tools[2], lines)
    scopes = _scopes(tree, tools[1], lines, leading, by_clauses=language in _BY_CLAUSES)
    for first, last in opaque:
        for line in range(first + 1, last + 1):
            document.breaks[line] = Break.INSIDE
    for scope in scopes:
        document.breaks[scope.first] = Break.BLOCK
        for line in range(scope.first + 1, min(scope.body, scope.end)):
            document.breaks[line] = Break.INSIDE
    return Document(lines, document.breaks, scopes=scopes)


@cache
def _tools(language: str) -> tuple[Language, Query, Query | None] | None:
    """Grammar, query for definitions, query for comments and strings; None for a language without any."""
    if language not in LANGUAGES:
        return None
    try:
        from tree_sitter import Query
        from tree_sitter_language_pack import get_language
    except ImportError:
        return None
    grammar = get_language(cast("Any", LANGUAGES[language][0]))
    kinds = {
        grammar.node_kind_for_id(number) for number in range(grammar.node_kind_count) if _is_shown(grammar, number)
    }
    named = sorted(kind for kind in kinds if kind and (_OPAQUE.fullmatch(kind) or _LEADING.fullmatch(kind)))
    return (
        grammar,
        Query(grammar, query_of(language)),
        Query(grammar, "[" + " ".join(f"({kind})" for kind in named) + "] @opaque") if named else None,
    )


def _is_shown(grammar: Language, number: int) -> bool:
    return grammar.node_kind_is_named(number) and grammar.node_kind_is_visible(number)


def _is_garbage(tree: Tree) -> bool:
    """Whether nothing makes sense; a query over thousands of errors in a row takes the square of their number."""
    root = tree.root_node
    return root.has_error and any(
        node.is_error and node.child_count > _MAX_ERRORS for node in (root, *root.children[:_MAX_ERRORS])
    )


def _opaque(tree: Tree, query: Query | None, lines: list[str]) -> tuple[list[tuple[int, int]], set[int]]:
    """(first, last) line of comments and strings of several lines; lines of what leads up to a definition."""
    from tree_sitter import QueryCursor

    if query is None:
        return [], set()
    opaque: list[tuple[int, int]] = []
    leading: set[int] = set()
    for node in QueryCursor(query).captures(tree.root_node).get("opaque", []):
        first, last = node.start_point[0], _last_line(node)
        if last > first:
            opaque.append((first, last))
        before = lines[first][: _characters(lines[first], node.start_point[1])]
        if _LEADING.fullmatch(node.type) and not before.strip():
            leading.update(range(first, last + 1))
    return opaque, leading


def _last_line(node: Node) -> int:
    """The last line of a node; one that ends with a line end reaches to the start of the next line."""
    row, column = node.end_point
    return row if column else max(node.start_point[0], row - 1)


def _scopes(tree: Tree, query: Query, lines: list[str], leading: set[int], *, by_clauses: bool) -> list[Scope]:
    from tree_sitter import QueryCursor

    found: dict[tuple[int, int], Scope] = {}
    for _, captures in QueryCursor(query).matches(tree.root_node):
        node = captures["def"][0]
        name = captures["name"][0] if "name" in captures else None
        title = _title(node, name)
        if not title:
            continue
        outer = _wrapped(node)
        last = _last_line(captures["end"][0]) if "end" in captures else _last_line(outer)
        first = outer.start_point[0]
        body = (name or node).start_point[0] + 1
        # What stands before the definition on its line belongs to something else, unless it is a word like `pub`.
        if not _MODIFIERS.fullmatch(lines[first][: _characters(lines[first], outer.start_point[1])]):
            continue
        while first > 0 and first - 1 in leading:
            first -= 1
        found.setdefault((first, last + 1), Scope(first, last + 1, title, max(body, first + 1)))
    return _proper(sorted(found.values(), key=lambda scope: (scope.first, -scope.end)), by_clauses)


def _characters(line: str, column: int) -> int:
    """A column in bytes as a number of characters."""
    return len(line.encode("utf-8", "replace")[:column].decode("utf-8", "ignore"))


def _wrapped(node: Node) -> Node:
    """The node with the decorators and key words around it."""
    while node.parent is not None and _WRAPPERS.fullmatch(node.parent.type) and len(_definitions(node.parent)) == 1:
        node = node.parent
    return node


def _definitions(node: Node) -> list[Node]:
    """Children that are neither comments, decorators nor parameters."""
    return [child for child in node.named_children if not _BESIDE.search(child.type)]


def _title(node: Node, name: Node | None) -> str:
    """A definition's name as it stands in a path."""
    if name is None and "function_definition" in node.type:
        name = _declared(node)
    if name is None:
        # A block of configuration: its first line, without the bracket.
        said = _text(node).split("\n", 1)[0].split("{", 1)[0].replace('"', "")
        return clean_title(said) if "block" in node.type else ""
    if node.type == "type_definition" and name.type == "function_declarator":
        return ""
    word = _WORD.search(_text(name).lstrip("('\"`"))
    title = word.group() if word is not None else ""
    receiver = node.child_by_field_name("receiver")
    if receiver is not None and title:  # a method of Go names the type that it belongs to
        types = re.findall(r"\w+", _text(receiver).split("[", 1)[0])
        title = f"{types[-1]}.{title}" if types else title
    return title[:_MAX_TITLE]


def _declared(node: Node) -> Node | None:
    """The name in C's nest of declarators."""
    name = node.child_by_field_name("declarator")
    while name is not None:
        inner = name.child_by_field_name("declarator")
        if inner is None:
            return name
        name = inner
    return None


def _text(node: Node) -> str:
    return (node.text or b"").decode("utf-8", "replace")


def _proper(scopes: list[Scope], by_clauses: bool) -> list[Scope]:
    """Scopes of more than a line that nest; clauses of one function that follow each other become one."""
    around: list[Scope] = []
    kept: list[Scope] = []
    for scope in scopes:
        while around and around[-1].end <= scope.first:
            around.pop()
        if (around and around[-1].end < scope.end) or len(around) >= _MAX_DEPTH:
            continue  # it begins on the line where another one ends
        previous = kept[-1] if kept else None
        if by_clauses and previous is not None and (previous.title, previous.end) == (scope.title, scope.first):
            scope = Scope(previous.first, scope.end, scope.title, previous.body)
            kept.pop()
        kept.append(scope)
        around.append(scope)
    return [scope for scope in kept if scope.end - scope.first > 1]
