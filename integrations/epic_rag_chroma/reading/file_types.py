"""File types by name: the kind of a file, its programming language, and its size limit."""

from __future__ import annotations

import os

__all__ = ["byte_limit", "kind_of", "language_of", "languages", "suffixes_by_kind", "unread_format"]


_KINDS = {
    "markdown": ".md .markdown .mdown .mkd .mdx .qmd .rmd",
    "rst": ".rst .rest",
    "asciidoc": ".adoc .asciidoc .asc",
    "latex": ".tex .latex .ltx .sty .cls",
    "bibtex": ".bib",
    "org": ".org",
    "man": ".1 .2 .3 .4 .5 .6 .7 .8 .man .mdoc .roff .troff",
    "html": ".html .htm .xhtml .xht .shtml",
    "csv": ".csv .tsv .tab .psv",
    "json": ".json .jsonc .json5 .geojson .webmanifest",
    "jsonl": ".jsonl .ndjson .jsonlines",
    "yaml": ".yaml .yml",
    "toml": ".toml",
    "ini": ".ini .cfg .conf .editorconfig",
    "properties": ".properties",
    "gettext": ".po .pot",
    "xml": ".xml .xsd .xsl .xslt .rss .atom .rdf .opml .wsdl",
    "svg": ".svg",
    "subtitles": ".srt .vtt .sbv .ass .ssa .lrc",
    "pdf": ".pdf",
    "docx": ".docx .docm .dotx .dotm",
    "pptx": ".pptx .pptm .ppsx .ppsm .potx .potm",
    "xlsx": ".xlsx .xlsm .xltx .xltm .xlsb .xls",
    "opendocument": ".odt .ott .fodt .ods .ots .fods .odp .otp .fodp",
    "rtf": ".rtf",
    "epub": ".epub",
    "notebook": ".ipynb",
    "email": ".eml .emlx .mht .mhtml",
    "mailbox": ".mbox",
    "outlook": ".msg .oft",
}
# Source code: the names that `--where lang=...` takes.
_LANGUAGES = {
    "python": ".py .pyi .pyx .pyw",
    "javascript": ".js .mjs .cjs .jsx",
    "typescript": ".ts .tsx .mts .cts",
    "java": ".java",
    "kotlin": ".kt .kts",
    "scala": ".scala .sc",
    "groovy": ".groovy .gradle",
    "c": ".c .h",
    "cpp": ".cc .cpp .cxx .hh .hpp .hxx .ipp",
    "csharp": ".cs",
    "go": ".go",
    "rust": ".rs",
    "swift": ".swift",
    "objc": ".m .mm",
    "ruby": ".rb .rake .gemspec",
    "perl": ".pl .pm",
    "php": ".php",
    "lua": ".lua",
    "r": ".r",
    "julia": ".jl",
    "haskell": ".hs",
    "ocaml": ".ml .mli",
    "elixir": ".ex .exs",
    "erlang": ".erl .hrl",
    "clojure": ".clj .cljs .cljc .edn",
    "elisp": ".el",
    "commonlisp": ".lisp .lsp",
    "scheme": ".scm .ss .rkt",
    "shell": ".sh .bash .zsh .ksh",
    "fish": ".fish",
    "powershell": ".ps1 .psm1",
    "sql": ".sql",
    "css": ".css .scss .less",
    "vue": ".vue",
    "svelte": ".svelte",
    "terraform": ".tf .tfvars .hcl",
    "cmake": ".cmake",
    "make": ".mk .mak",
    "dockerfile": ".dockerfile",
    "starlark": ".bzl",
    "nix": ".nix",
    "zig": ".zig",
    "nim": ".nim",
    "dart": ".dart",
    "vim": ".vim",
    "proto": ".proto",
    "graphql": ".graphql .gql",
    "fortran": ".f .f90 .f95 .f03",
    "pascal": ".pas .pp",
    "verilog": ".v .sv",
    "vhdl": ".vhd .vhdl",
    "solidity": ".sol",
}
# Source code without a suffix.
_NAMES = {
    "make": "makefile gnumakefile",
    "dockerfile": "dockerfile containerfile",
    "cmake": "cmakelists.txt",
    "ruby": "rakefile gemfile vagrantfile",
    "groovy": "jenkinsfile",
    "starlark": "build.bazel workspace.bazel",
}
# Formats without a reader, by the reason that is reported for their files.
_UNREAD = {
    "a picture": """.png .jpg .jpeg .jpe .gif .bmp .tif .tiff .webp .ico .icns .psd .heic .heif .avif .jxl .svgz .xcf
        .raw .cr2 .nef .dng .tga""",
    "sound": ".mp3 .wav .flac .ogg .oga .opus .m4a .aac .aif .aiff .wma .mid .midi",
    "a film": ".mp4 .m4v .mov .avi .mkv .webm .wmv .flv .mpg .mpeg .3gp",
    "an archive": """.zip .gz .bz2 .xz .zst .lz4 .7z .rar .tar .tgz .tbz2 .txz .jar .war .ear .whl .egg .deb .rpm .apk
        .dmg .iso .img .cab""",
    "a program": ".exe .dll .so .dylib .a .lib .o .obj .pyc .pyo .pyd .class .wasm .bin .msi .elc",
    "data of a program": """
        .dat .db .sqlite .sqlite3 .mdb .accdb .dbf .parquet .arrow .feather .npy .npz .pt .pth .onnx
        .safetensors .gguf .pkl .pickle .h5 .hdf5 .mat .rds .rdata .mo .idx .pack .ds_store""",
    "a font": ".ttf .otf .woff .woff2 .eot .pfb",
    "an old Word document; save it as .docx": ".doc .dot",
    "an old PowerPoint presentation; save it as .pptx": ".ppt .pps .pot",
    "an Apple iWork document; export it as PDF": ".pages .numbers",
    "a Kindle book; convert it to EPUB": ".mobi .azw .azw3 .kfx",
    "a DjVu document; convert it to PDF": ".djvu .djv",
    "an XPS document; convert it to PDF": ".xps .oxps",
    "an Outlook data file; export its messages as .eml or .mbox": ".pst .ost .dbx .olm",
    "a OneNote file; export it as PDF or .docx": ".one .onetoc2",
    "a Visio or Publisher file; export it as PDF": ".vsd .vsdx .pub",
}

_KIND_OF = {suffix: kind for kind, suffixes in _KINDS.items() for suffix in suffixes.split()}
_LANGUAGE_OF = {suffix: language for language, suffixes in _LANGUAGES.items() for suffix in suffixes.split()}
_LANGUAGE_OF_NAME = {name: language for language, names in _NAMES.items() for name in names.split()}
_UNREAD_REASON = {suffix: reason for reason, suffixes in _UNREAD.items() for suffix in suffixes.split()}

# Above this size, text is a data dump; a file is held in memory.
_TEXT_LIMIT = 16 * 2**20
# Images and fonts make up most of a large document.
_LIMITS = {
    "pdf": 256 * 2**20,
    **dict.fromkeys(("docx", "pptx", "xlsx", "opendocument", "epub"), 128 * 2**20),
    **dict.fromkeys(("notebook", "email", "mailbox", "outlook"), 64 * 2**20),
}


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def unread_format(name: str) -> str:
    """Return the format of a file that no reader reads, by its suffix; "" if it may be read."""
    return _UNREAD_REASON.get(_suffix(name), "")


def language_of(name: str) -> str:
    """Return the programming language of a file ("python", "typescript"); "" if it is not source code."""
    return _LANGUAGE_OF_NAME.get(os.path.basename(name).lower()) or _LANGUAGE_OF.get(_suffix(name), "")


def kind_of(name: str) -> str:
    """Return the kind of a file ("markdown", "pdf", "code", ...); "text" if its suffix is unknown."""
    return "code" if language_of(name) else _KIND_OF.get(_suffix(name), "text")


def byte_limit(name: str) -> int:
    """Return the size above which a file is skipped."""
    return _LIMITS.get(kind_of(name), _TEXT_LIMIT)


def suffixes_by_kind() -> dict[str, tuple[str, ...]]:
    """Return the suffixes of each kind but "code" (see `languages`) and "text" (all others)."""
    return {kind: tuple(suffixes.split()) for kind, suffixes in _KINDS.items()}


def languages() -> tuple[str, ...]:
    """Return the programming languages that `language_of` knows."""
    return tuple(_LANGUAGES)
