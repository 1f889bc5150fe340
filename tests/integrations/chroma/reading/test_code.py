"""Source code: functions and classes are scopes, their names the heading path."""

from __future__ import annotations

import logging
import sys

import pytest

from epic_rag_chroma.chunking import Chunk, chunk_document
from epic_rag_chroma.reading import code as source
from epic_rag_chroma.reading.file_types import kind_of, language_of
from epic_rag_chroma.reading.reader import read_document

SERVER = '''\
"""A server."""

import os


# Where it listens.
PORT = 80


@decorated
class Server:
    """Answers."""

    def handle(self, request):
        # a comment in it

        text = """
def no_function(): pass
"""
        return text

    # What ends it.
    @property
    def stop(self):
        return self.done


def main():
    Server().handle(1)
'''

# A definition of several lines in each language, and the path of a chunk that is the inner one.
SAMPLES = {
    "python": ("class A:\n    x = 1\n\n    def f(self):\n        a\n        b\n", ("A", "f")),
    "starlark": ("def f(x):\n    a\n    return x\n", ("f",)),
    "javascript": ("export class A {\n  x = 1;\n\n  f() {\n    a;\n  }\n}\n", ("A", "f")),
    "typescript": ("namespace N {\n  let x = 1;\n\n  interface I {\n    a: string;\n  }\n}\n", ("N", "I")),
    "java": ("class A {\n  int x;\n\n  @Override\n  void f() {\n    a();\n  }\n}\n", ("A", "f")),
    "kotlin": ("class A {\n  val x = 1\n\n  fun f() {\n    a()\n  }\n}\n", ("A", "f")),
    "scala": ("object A {\n  val x = 1\n\n  def f(): Int = {\n    a\n  }\n}\n", ("A", "f")),
    "c": ("static int *f(int a)\n{\n  b();\n  return 0;\n}\n", ("f",)),
    "cpp": ("namespace n {\nint x;\n\nvoid A::f() const {\n  b();\n}\n}\n", ("n", "A::f")),
    "csharp": ("class A {\n  int x;\n\n  void F() {\n    b();\n  }\n}\n", ("A", "F")),
    "go": ("func (s *Server) Handle(r int) {\n\tb()\n\tc()\n}\n", ("Server.Handle",)),
    "rust": ("impl<T> Tr for S {\n  const X: u8 = 1;\n\n  fn f(&self) {\n    b();\n  }\n}\n", ("S", "f")),
    "swift": ("class A {\n  let x = 1\n\n  func f() {\n    b()\n  }\n}\n", ("A", "f")),
    "objc": ("@implementation A\n- (int)x {\n  return 1;\n}\n\n- (void)f {\n  b();\n}\n@end\n", ("A", "f")),
    "ruby": ("module M\n  X = 1\n\n  def self.f\n    b\n  end\nend\n", ("M", "f")),
    "perl": ("sub f {\n  b;\n  1;\n}\n", ("f",)),
    "php": ("<?php\nclass A {\n  const X = 1;\n\n  function f() {\n    b();\n  }\n}\n", ("A", "f")),
    "lua": ("M.f = function()\n  b()\n  c()\nend\n", ("M.f",)),
    "r": ("f <- function(x) {\n  b\n  x\n}\n", ("f",)),
    "julia": ("module M\nx = 1\n\nfunction f(x)\n  b\nend\nend\n", ("M", "f")),
    "haskell": ("module M where\n\nf :: Int -> Int\nf 0 = 1\nf x = x\n  where y = 1\n", ("f",)),
    "ocaml": ("module M = struct\n  let x = 1\n\n  let f y =\n    b y\nend\n", ("M", "f")),
    "elixir": ("defmodule M do\n  @x 1\n\n  def f(x) do\n    x\n  end\nend\n", ("M", "f")),
    "erlang": ("f(0) ->\n  1;\nf(X) ->\n  X.\n", ("f",)),
    "clojure": ("(ns a.b)\n\n(defn f [x]\n  (b x)\n  x)\n", ("f",)),
    "elisp": ("(defun f (x)\n  (b x)\n  x)\n", ("f",)),
    "commonlisp": ("(defun f (x)\n  (b x)\n  x)\n", ("f",)),
    "scheme": ("(define (f x)\n  (b x)\n  x)\n", ("f",)),
    "shell": ("f() {\n  b\n  c\n}\n", ("f",)),
    "fish": ("function f\n  b\n  c\nend\n", ("f",)),
    "powershell": ("function F {\n  b\n  c\n}\n", ("F",)),
    "sql": ("CREATE TABLE a (\n  id int,\n  b int\n);\n", ("a",)),
    "terraform": ('resource "a" "b" {\n  x = 1\n  y = 2\n}\n', ("resource a b",)),
    "cmake": ("function(f a)\n  b()\n  c()\nendfunction()\n", ("f",)),
    "zig": ("const S = struct {\n  x: u8,\n\n  pub fn f() void {\n    b();\n  }\n};\n", ("S", "f")),
    "nim": ("proc f(x: int) =\n  b\n  x\n", ("f",)),
    "dart": ("class A {\n  int x = 1;\n\n  void f() {\n    b();\n  }\n}\n", ("A", "f")),
    "vim": ("function! F()\n  call b()\n  return\nendfunction\n", ("F",)),
    "proto": ("message M {\n  string a = 1;\n  string b = 2;\n}\n", ("M",)),
    "graphql": ("type A {\n  b: C\n  d: E\n}\n", ("A",)),
    "solidity": ("contract C {\n  uint x;\n\n  function f() public {\n    b();\n  }\n}\n", ("C", "f")),
    "fortran": ("subroutine s(x)\n  x = 1\n  x = 2\nend subroutine\n", ("s",)),
    "pascal": ("program p;\nvar x: integer;\n\nprocedure q;\nbegin\n  b;\nend;\n\nbegin\nend.\n", ("q",)),
    "verilog": ("module m(a);\n  input a;\n  wire b;\nendmodule\n", ("m",)),
    "vhdl": ("entity e is\n  port (a : in bit);\n\nend entity;\n", ("e",)),
}


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def cut(text: str, language: str, size: int) -> list[Chunk]:
    document = source.read_code(text.split("\n"), language)
    return chunk_document(document, max_tokens=size, overlap=0, count_tokens=count_words)


def places(chunks: list[Chunk]) -> list[tuple[tuple[str, ...], int | None, int | None]]:
    return [(chunk.heading_path, chunk.first_line, chunk.last_line) for chunk in chunks]


def test_classes_and_methods() -> None:
    assert places(cut(SERVER, "python", 60)) == [((), 1, 7), (("Server",), 10, 25), (("main",), 28, 29)]
    chunks = cut(SERVER, "python", 24)
    assert places(chunks) == [
        ((), 1, 7),
        (("Server",), 10, 12),
        (("Server", "handle"), 14, 20),
        (("Server", "stop"), 22, 25),
        (("main",), 28, 29),
    ]
    assert chunks[2].embedded.startswith("Server > handle\n\n    def handle")
    assert chunks[4].embedded.startswith("def main")


def test_long_function() -> None:
    body = "\n\n".join(f"    step_{n}(one, two)\n    log('done with {n}')" for n in range(20))
    chunks = cut(f"def long():\n{body}\n", "python", 20)
    assert len(chunks) > 5
    assert {chunk.heading_path for chunk in chunks} == {("long",)}
    assert all(chunk.embedded.startswith(("long\n\n", "def long")) for chunk in chunks)
    assert all(chunk.text.startswith(("def", "    step_")) for chunk in chunks)
    assert max(chunk.tokens for chunk in chunks) <= 20


def test_every_language_has_a_sample() -> None:
    assert set(SAMPLES) == set(source.LANGUAGES)


@pytest.mark.parametrize("language", sorted(SAMPLES))
def test_languages(language: str) -> None:
    text, path = SAMPLES[language]
    around = len(path) > 1
    size = max(4, len(text.split()) - 1) if around else 100
    chunks = cut(text, language, size)
    paths = [chunk.heading_path for chunk in chunks]
    assert path in paths
    said = next(chunk.text for chunk in chunks if chunk.heading_path == path)
    assert path[-1].split(".")[-1].split()[0] in said


@pytest.mark.parametrize("language", ["javascript", "typescript"])
def test_assigned_functions(language: str) -> None:
    text = (
        "/** Adds. */\nconst add = async (a, b) => {\n  return a + b;\n};\n\n"
        "exports.sub = function () {\n  return 1;\n};\n\nexport default {\n  key: () => {\n    x;\n  },\n};\n"
    )
    assert places(cut(text, language, 24)) == [
        (("add",), 1, 4),
        (("exports.sub",), 6, 8),
        ((), 10, 10),
        (("key",), 11, 14),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "def",
        "class A(:\n  def f(:\n",
        "}" * 500,
        "{" * 2000,
        "def f():\n" * 300,
        "\x0c\x0b é \u2028 x\n" * 9,
    ],
)
@pytest.mark.parametrize("language", ["python", "cpp", "javascript", "haskell", "ruby"])
def test_broken_code(text: str, language: str) -> None:
    chunks = cut(text, language, 10)
    shown = "\n".join(chunk.text for chunk in chunks)
    assert all(line in shown for line in text.split("\n") if line.strip() and len(line.split()) < 5)


def test_deep_nesting() -> None:
    text = "\n".join("function f() {" for _ in range(3000)) + "\n" + "\n".join("}" for _ in range(3000))
    assert max(len(chunk.heading_path) for chunk in cut(text, "javascript", 20)) <= 8


def test_thousands_of_errors() -> None:
    document = source.read_code(("(\n" * 100_000 + SERVER).split("\n"), "python")
    assert not document.scopes
    assert chunk_document(document, max_tokens=24, overlap=0, count_tokens=count_words)


def test_missing_parser(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "tree_sitter_language_pack", None)
    source._tools.cache_clear()
    try:
        document = read_document("a.py", SERVER.encode())
    finally:
        source._tools.cache_clear()
    assert not document.scopes
    assert chunk_document(document, max_tokens=24, overlap=0, count_tokens=count_words)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    source.warn_of_missing_parser.cache_clear()
    with caplog.at_level(logging.WARNING):
        source.warn_of_missing_parser()
        source.warn_of_missing_parser()
    source.warn_of_missing_parser.cache_clear()
    assert caplog.text.count("epic-rag[index]") == 1


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("a.py", "python"), ("b/C.TSX", "typescript"), ("Makefile", "make"), ("x/Dockerfile", "dockerfile"),
        ("CMakeLists.txt", "cmake"), ("a.h", "c"), ("notes.txt", ""), ("a.json", ""), ("README", ""), ("a.md", ""),
    ],
)  # fmt: skip
def test_languages_by_name(name: str, language: str) -> None:
    assert language_of(name) == language
    assert (kind_of(name) == "code") == bool(language)
