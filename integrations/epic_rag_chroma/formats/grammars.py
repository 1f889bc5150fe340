"""What a definition looks like in each language's syntax tree: queries for tree-sitter.

A query captures the definition as @def, its name as @name where the tree has one, and as @end the node that it ends
with if that is another one. Most languages need no more than the names of node types whose field `name` has the name;
`type:child` is a node type whose name is its first child of type `child`.
"""

from __future__ import annotations

from functools import cache

__all__ = ["LANGUAGES", "query_of"]

_JAVASCRIPT = (
    "function_declaration generator_function_declaration class_declaration method_definition",
    """(variable_declarator name: (_) @name value: [(arrow_function) (function_expression) (class)]) @def
    (assignment_expression left: (_) @name right: [(arrow_function) (function_expression) (class)]) @def
    (pair key: (_) @name value: [(arrow_function) (function_expression)]) @def""",
)
_C = (
    "",
    """(function_definition) @def
    (struct_specifier name: (_) @name body: (_)) @def
    (union_specifier name: (_) @name body: (_)) @def
    (enum_specifier name: (_) @name body: (_)) @def
    (type_definition declarator: (_) @name) @def""",
)
_SWIFT = "class_declaration protocol_declaration function_declaration init_declaration"
_CSHARP = """class_declaration struct_declaration interface_declaration record_declaration enum_declaration
    namespace_declaration method_declaration constructor_declaration property_declaration"""
_PHP = """class_declaration interface_declaration trait_declaration enum_declaration method_declaration
    function_definition"""
_JAVA = """class_declaration interface_declaration enum_declaration record_declaration annotation_type_declaration
    method_declaration constructor_declaration"""

# language -> (grammar, node types, further patterns)
LANGUAGES: dict[str, tuple[str, str, str]] = {
    "python": ("python", "function_definition class_definition", ""),
    "starlark": ("starlark", "function_definition", ""),
    "javascript": ("javascript", *_JAVASCRIPT),
    "typescript": (
        "tsx",
        f"{_JAVASCRIPT[0]} abstract_class_declaration interface_declaration enum_declaration type_alias_declaration "
        "internal_module",
        _JAVASCRIPT[1],
    ),
    "java": ("java", _JAVA, ""),
    "kotlin": (
        "kotlin",
        "class_declaration:type_identifier object_declaration:type_identifier function_declaration:simple_identifier",
        "",
    ),
    "scala": ("scala", "class_definition object_definition trait_definition function_definition", ""),
    "c": ("c", *_C),
    "cpp": ("cpp", "class_specifier namespace_definition", _C[1]),
    "csharp": ("csharp", _CSHARP, ""),
    "go": ("go", "function_declaration method_declaration type_spec", ""),
    "rust": (
        "rust",
        "mod_item function_item struct_item enum_item union_item trait_item macro_definition",
        "(impl_item type: (_) @name) @def",
    ),
    "swift": ("swift", _SWIFT, ""),
    "objc": (
        "objc",
        "class_interface:identifier class_implementation:identifier method_definition:identifier",
        _C[1],
    ),
    "ruby": ("ruby", "module class method singleton_method", ""),
    "perl": ("perl", "subroutine_declaration_statement", ""),
    "php": ("php", _PHP, ""),
    "lua": (
        "lua",
        "function_declaration",
        """(assignment_statement (variable_list name: (_) @name)
            (expression_list value: (function_definition))) @def""",
    ),
    "r": ("r", "", "(binary_operator lhs: (_) @name rhs: (function_definition)) @def"),
    "julia": (
        "julia",
        "module_definition",
        """(function_definition (signature) @name) @def
        (macro_definition (signature) @name) @def
        (struct_definition (type_head) @name) @def""",
    ),
    "haskell": (
        "haskell",
        "",
        """(declarations [(signature name: (_) @name) (function name: (_) @name) (bind name: (_) @name)
            (data_type name: (_) @name) (newtype name: (_) @name) (class name: (_) @name)
            (instance name: (_) @name)] @def)""",
    ),
    "ocaml": (
        "ocaml",
        "",
        """(value_definition (let_binding pattern: (value_name) @name)) @def
        (module_definition (module_binding (module_name) @name)) @def
        (type_definition (type_binding name: (_) @name)) @def""",
    ),
    "elixir": (
        "elixir",
        "",
        '((call target: (identifier) @head (arguments . (_) @name)) @def (#match? @head "^def"))',
    ),
    "erlang": ("erlang", "", "(fun_decl clause: (function_clause name: (_) @name)) @def"),
    "clojure": ("clojure", "", '((list_lit . (sym_lit) @head . (_) @name) @def (#match? @head "^def"))'),
    "elisp": ("elisp", "function_definition macro_definition", ""),
    "commonlisp": ("commonlisp", "", "(defun (defun_header function_name: (_) @name)) @def"),
    "scheme": ("scheme", "", '((list . (symbol) @head . (_) @name) @def (#match? @head "^define"))'),
    "shell": ("bash", "function_definition", ""),
    "fish": ("fish", "function_definition", ""),
    "powershell": (
        "powershell",
        "function_statement:function_name class_statement:simple_name class_method_definition:simple_name",
        "",
    ),
    "sql": (
        "sql",
        "",
        """(create_table (object_reference) @name) @def
        (create_view (object_reference) @name) @def
        (create_function (object_reference) @name) @def""",
    ),
    "terraform": ("terraform", "", "(config_file (body (block) @def))"),
    "cmake": (
        "cmake",
        "",
        """(function_def (function_command (argument_list . (_) @name))) @def
        (macro_def (macro_command (argument_list . (_) @name))) @def""",
    ),
    "zig": (
        "zig",
        "",
        """(Decl (FnProto function: (_) @name)) @def
        (Decl (VarDecl variable_type_function: (_) @name)) @def""",
    ),
    "nim": (
        "nim",
        "proc_declaration func_declaration template_declaration macro_declaration method_declaration "
        "iterator_declaration",
        "",
    ),
    "dart": (
        "dart",
        "class_definition enum_declaration extension_declaration",
        """((function_signature name: (_) @name) @def . (function_body) @end)
        ((method_signature (function_signature name: (_) @name)) @def . (function_body) @end)""",
    ),
    "vim": ("vim", "", "(function_definition (function_declaration name: (_) @name)) @def"),
    "proto": ("proto", "message:message_name service:service_name enum:enum_name", ""),
    "graphql": ("graphql", "", "(type_definition (_ (name) @name)) @def"),
    "solidity": (
        "solidity",
        "contract_declaration interface_declaration library_declaration function_definition modifier_definition "
        "struct_declaration",
        "",
    ),
    "fortran": (
        "fortran",
        "",
        """(subroutine (subroutine_statement name: (_) @name)) @def
        (function (function_statement name: (_) @name)) @def
        (module (module_statement (name) @name)) @def""",
    ),
    "pascal": ("pascal", "", "(defProc header: (declProc name: (_) @name)) @def"),
    "verilog": ("verilog", "", "(module_declaration (module_header (simple_identifier) @name)) @def"),
    "vhdl": ("vhdl", "entity_declaration architecture_body package_declaration", ""),
}


@cache
def query_of(language: str) -> str:
    """The query of a language's definitions."""
    _, types, further = LANGUAGES[language]
    patterns = []
    for name in types.split():
        kind, _, child = name.partition(":")
        patterns.append(f"({kind} ({child}) @name) @def" if child else f"({kind} name: (_) @name) @def")
    return "\n".join([*patterns, further])
