"""Read source code by its syntax: functions and classes are scopes that stay whole where they fit into a chunk.

tree-sitter parses some fifty languages, including code with errors. Without it, and for other languages, code is split
at blank lines and by indentation. `LANGUAGES` has the definitions of each language.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from epic_rag_chroma.reading.document import Document, Scope, SplitCost, clean_title
from epic_rag_chroma.reading.escapes import code_escapes

if TYPE_CHECKING:
    from tree_sitter import Language, Node, Query, Tree

__all__ = ["LANGUAGES", "read_code", "warn_of_missing_parser"]


_JAVASCRIPT_TYPES = "function_declaration generator_function_declaration class_declaration method_definition"
_JAVASCRIPT = """
    (variable_declarator name: (_) @name value: [(arrow_function) (function_expression) (class)]) @def
    (assignment_expression left: (_) @name right: [(arrow_function) (function_expression) (class)]) @def
    (pair key: (_) @name value: [(arrow_function) (function_expression)]) @def"""
_C = """
    (function_definition) @def
    (struct_specifier name: (_) @name body: (_)) @def
    (union_specifier name: (_) @name body: (_)) @def
    (enum_specifier name: (_) @name body: (_)) @def
    (type_definition declarator: (_) @name) @def"""

# The definitions of each language: node types with a field `name`, `type:child` for node types whose name is their
# first child of type `child`, then queries. A query captures the definition as @def, its name as @name where the tree
# has one, and its last node as @end if that is outside the definition.
LANGUAGES = {
    "python": "function_definition class_definition",
    "starlark": "function_definition",
    "javascript": _JAVASCRIPT_TYPES + _JAVASCRIPT,
    "typescript": _JAVASCRIPT_TYPES
    + " abstract_class_declaration interface_declaration enum_declaration type_alias_declaration internal_module"
    + _JAVASCRIPT,
    "java": """class_declaration interface_declaration enum_declaration record_declaration method_declaration
        annotation_type_declaration constructor_declaration""",
    "kotlin": "class_declaration:type_identifier object_declaration:type_identifier "
    "function_declaration:simple_identifier",
    "scala": "class_definition object_definition trait_definition function_definition",
    "c": _C,
    "cpp": "class_specifier namespace_definition" + _C,
    "csharp": """class_declaration struct_declaration interface_declaration record_declaration enum_declaration
        namespace_declaration method_declaration constructor_declaration property_declaration""",
    "go": "function_declaration method_declaration type_spec",
    "rust": """mod_item function_item struct_item enum_item union_item trait_item macro_definition
        (impl_item type: (_) @name) @def""",
    "swift": "class_declaration protocol_declaration function_declaration init_declaration",
    "objc": "class_interface:identifier class_implementation:identifier method_definition:identifier" + _C,
    "ruby": "module class method singleton_method",
    "perl": "subroutine_declaration_statement",
    "php": """class_declaration interface_declaration trait_declaration enum_declaration method_declaration
        function_definition""",
    "lua": """function_declaration
        (assignment_statement (variable_list name: (_) @name) (expression_list value: (function_definition))) @def""",
    "r": "(binary_operator lhs: (_) @name rhs: (function_definition)) @def",
    "julia": """module_definition
        (function_definition (signature) @name) @def
        (macro_definition (signature) @name) @def
        (struct_definition (type_head) @name) @def""",
    "haskell": """(declarations [
        (signature name: (_) @name) (function name: (_) @name) (bind name: (_) @name) (data_type name: (_) @name)
        (newtype name: (_) @name) (class name: (_) @name) (instance name: (_) @name)] @def)""",
    "ocaml": """(value_definition (let_binding pattern: (value_name) @name)) @def
        (module_definition (module_binding (module_name) @name)) @def
        (type_definition (type_binding name: (_) @name)) @def""",
    "elixir": '((call target: (identifier) @head (arguments . (_) @name)) @def (#match? @head "^def"))',
    "erlang": "(fun_decl clause: (function_clause name: (_) @name)) @def",
    "clojure": '((list_lit . (sym_lit) @head . (_) @name) @def (#match? @head "^def"))',
    "elisp": "function_definition macro_definition",
    "commonlisp": "(defun (defun_header function_name: (_) @name)) @def",
    "scheme": '((list . (symbol) @head . (_) @name) @def (#match? @head "^define"))',
    "shell": "function_definition",
    "fish": "function_definition",
    "powershell": "function_statement:function_name class_statement:simple_name class_method_definition:simple_name",
    "sql": """(create_table (object_reference) @name) @def
        (create_view (object_reference) @name) @def
        (create_function (object_reference) @name) @def""",
    "terraform": "(config_file (body (block) @def))",
    "cmake": """(function_def (function_command (argument_list . (_) @name))) @def
        (macro_def (macro_command (argument_list . (_) @name))) @def""",
    "zig": """(Decl (FnProto function: (_) @name)) @def
        (Decl (VarDecl variable_type_function: (_) @name)) @def""",
    "nim": """proc_declaration func_declaration template_declaration macro_declaration method_declaration
        iterator_declaration""",
    "dart": """class_definition enum_declaration extension_declaration
        ((function_signature name: (_) @name) @def . (function_body) @end)
        ((method_signature (function_signature name: (_) @name)) @def . (function_body) @end)""",
    "vim": "(function_definition (function_declaration name: (_) @name)) @def",
    "proto": "message:message_name service:service_name enum:enum_name",
    "graphql": "(type_definition (_ (name) @name)) @def",
    "solidity": """contract_declaration interface_declaration library_declaration function_definition
        modifier_definition struct_declaration""",
    "fortran": """(subroutine (subroutine_statement name: (_) @name)) @def
        (function (function_statement name: (_) @name)) @def
        (module (module_statement (name) @name)) @def""",
    "pascal": "(defProc header: (declProc name: (_) @name)) @def",
    "verilog": "(module_declaration (module_header (simple_identifier) @name)) @def",
    "vhdl": "entity_declaration architecture_body package_declaration",
}
# The grammars whose names differ from the language's.
_GRAMMARS = {"typescript": "tsx", "shell": "bash"}


def _query_of(language: str) -> str:
    """Return the tree-sitter query for a language's definitions."""
    types, bracket, queries = LANGUAGES[language].partition("(")
    patterns = []
    for name in types.split():
        kind, _, child = name.partition(":")
        patterns.append(f"({kind} ({child}) @name) @def" if child else f"({kind} name: (_) @name) @def")
    return "\n".join([*patterns, bracket + queries])


logger = logging.getLogger(__name__)

_PACKAGE = "tree_sitter_language_pack"
# Definitions nested deeper than this are ignored.
_MAX_DEPTH = 8
_MAX_TITLE = 200
_MAX_ERRORS = 5000
# Nodes that wrap a definition with its decorators, `export` or template parameters.
_WRAPPERS = re.compile(
    r"decorated_definition|export_statement|ambient_declaration|template_declaration|type_declaration"
    r"|lexical_declaration|variable_declaration|expression_statement|statement|definition|type_system_definition"
)
_BESIDE = re.compile("comment|decorator|parameters|modifier")
# Nodes before a definition that are part of its scope.
_LEADING = re.compile(r".*comment.*|attribute_item|attribute|annotation|marker_annotation|pragma|haddock")
# Nodes without inner structure.
_OPAQUE = re.compile(r".*(comment|string|heredoc|template_literal|raw_text|char_literal|pod).*")
_MODIFIERS = re.compile(r"[\w\s]*")
# Languages in which a function may be written as several definitions, one for each pattern.
_BY_CLAUSES = frozenset({"elixir", "erlang", "haskell"})
_WORD = re.compile(r"[\w.:$@~!?*+/<>=-]+")
_CLOSING = re.compile(r"^[\s})\]>;,]+$|^\s*(end|fi|done|esac)\b")


@cache
def warn_of_missing_parser() -> None:
    """Log a warning, once, if the package that parses source code is not installed."""
    if importlib.util.find_spec(_PACKAGE) is None:
        logger.warning(
            "source code is split by blank lines and indentation because tree-sitter-language-pack is not installed. "
            "Run `pip install 'epic-rag[index]'` to split it by its syntax."
        )


def read_code(lines: list[str], language: str) -> Document:
    """Read source code.

    Args:
        lines: The file's lines.
        language: The language, as `file_types.language_of` returns it.
    """
    document = Document(lines, _costs_by_indentation(lines), substitutions=code_escapes(lines))
    tools = _tools(language)
    if tools is None:
        return document
    from tree_sitter import Parser

    tree = Parser(tools[0]).parse("\n".join(lines).encode("utf-8", "replace"))
    root = tree.root_node
    if root.has_error and any(
        node.is_error and node.child_count > _MAX_ERRORS for node in (root, *root.children[:_MAX_ERRORS])
    ):
        return document  # thousands of errors in a row, for which a query takes quadratic time
    opaque, leading = _opaque_lines(tree, tools[2], lines)
    scopes = _scopes(tree, tools[1], lines, leading, by_clauses=language in _BY_CLAUSES)
    for first, last in opaque:
        for line in range(first + 1, last + 1):
            document.split_costs[line] = SplitCost.INSIDE
    for scope in scopes:
        document.split_costs[scope.first] = SplitCost.BLOCK
        for line in range(scope.first + 1, min(scope.body, scope.end)):
            document.split_costs[line] = SplitCost.INSIDE
    return Document(lines, document.split_costs, scopes=scopes, substitutions=document.substitutions)


def _costs_by_indentation(lines: list[str]) -> list[SplitCost]:
    """Return split costs: lowest before unindented lines after a blank line, then at blank lines."""
    costs = []
    previous = ""
    for line in lines:
        indented = line[:1] in (" ", "\t")
        if not line.strip() or _CLOSING.match(line):
            costs.append(SplitCost.INSIDE)
        elif not previous.strip():
            costs.append(SplitCost.SENTENCE if indented else SplitCost.BLOCK)
        else:
            costs.append(SplitCost.INSIDE if indented else SplitCost.LINE)
        previous = line
    return costs


@cache
def _tools(language: str) -> tuple[Language, Query, Query | None] | None:
    """Return a language's grammar, query for definitions, and query for comments and strings; None if unsupported."""
    if language not in LANGUAGES:
        return None
    try:
        from tree_sitter import Query
        from tree_sitter_language_pack import get_language
    except ImportError:
        return None
    grammar = get_language(cast("Any", _GRAMMARS.get(language, language)))
    kinds = {
        grammar.node_kind_for_id(number)
        for number in range(grammar.node_kind_count)
        if grammar.node_kind_is_named(number) and grammar.node_kind_is_visible(number)
    }
    named = sorted(kind for kind in kinds if kind and (_OPAQUE.fullmatch(kind) or _LEADING.fullmatch(kind)))
    return (
        grammar,
        Query(grammar, _query_of(language)),
        Query(grammar, "[" + " ".join(f"({kind})" for kind in named) + "] @opaque") if named else None,
    )


def _opaque_lines(tree: Tree, query: Query | None, lines: list[str]) -> tuple[list[tuple[int, int]], set[int]]:
    """Return (first, last) line of multi-line comments and strings, and the lines that lead up to a definition."""
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
    """Return the last line of a node; a node that ends with a line end reaches to the start of the next line."""
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
        outer = node  # with decorators and key words around the definition
        while (
            outer.parent is not None
            and _WRAPPERS.fullmatch(outer.parent.type)
            and sum(not _BESIDE.search(child.type) for child in outer.parent.named_children) == 1
        ):
            outer = outer.parent
        last = _last_line(captures["end"][0]) if "end" in captures else _last_line(outer)
        first = outer.start_point[0]
        body = (name or node).start_point[0] + 1
        # Code before the definition on its line is not part of it, except for modifiers such as `pub`.
        if not _MODIFIERS.fullmatch(lines[first][: _characters(lines[first], outer.start_point[1])]):
            continue
        while first > 0 and first - 1 in leading:
            first -= 1
        found.setdefault((first, last + 1), Scope(first, last + 1, title, max(body, first + 1)))
    return _nested(sorted(found.values(), key=lambda scope: (scope.first, -scope.end)), by_clauses)


def _characters(line: str, column: int) -> int:
    """Convert a column in bytes to a number of characters."""
    return len(line.encode("utf-8", "replace")[:column].decode("utf-8", "ignore"))


def _title(node: Node, name: Node | None) -> str:
    """Return the name of a definition as a scope title."""
    if name is None and "function_definition" in node.type:
        # The name is inside C's nested declarators.
        inner = node.child_by_field_name("declarator")
        while inner is not None:
            name, inner = inner, inner.child_by_field_name("declarator")
    if name is None:
        # A block of configuration: its first line, without the bracket.
        first_line = _text(node).split("\n", 1)[0].split("{", 1)[0].replace('"', "")
        return clean_title(first_line) if "block" in node.type else ""
    if node.type == "type_definition" and name.type == "function_declarator":
        return ""
    word = _WORD.search(_text(name).lstrip("('\"`"))
    title = word.group() if word is not None else ""
    receiver = node.child_by_field_name("receiver")
    if receiver is not None and title:  # Go: the type of a method
        types = re.findall(r"\w+", _text(receiver).split("[", 1)[0])
        title = f"{types[-1]}.{title}" if types else title
    return title[:_MAX_TITLE]


def _text(node: Node) -> str:
    return (node.text or b"").decode("utf-8", "replace")


def _nested(scopes: list[Scope], by_clauses: bool) -> list[Scope]:
    """Drop scopes of one line and those that overlap in part; merge consecutive clauses of one function."""
    around: list[Scope] = []
    kept: list[Scope] = []
    for scope in scopes:
        while around and around[-1].end <= scope.first:
            around.pop()
        if (around and around[-1].end < scope.end) or len(around) >= _MAX_DEPTH:
            continue  # begins on the line where another one ends
        previous = kept[-1] if kept else None
        if by_clauses and previous is not None and (previous.title, previous.end) == (scope.title, scope.first):
            scope = Scope(previous.first, scope.end, scope.title, previous.body)
            kept.pop()
        kept.append(scope)
        around.append(scope)
    return [scope for scope in kept if scope.end - scope.first > 1]
