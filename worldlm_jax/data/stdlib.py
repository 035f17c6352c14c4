"""Texts out of the running Python's own standard library: a federation's worth of data on any machine.

Each family is a set of source files that no other family uses, split 90/5/5 by file; `prose/reference`,
which comes from one file, is split by topic. The texts differ a little between versions of Python and
between builds that leave modules out, and are always the same for one installation.
"""

import ast
import hashlib
import inspect
import re
import sys
import sysconfig
import threading
from collections.abc import Iterable
from pathlib import Path

from worldlm_jax import checks, config
from worldlm_jax.data.documents import SPLITS, Corpus, Document

FAMILIES = {
  "prose/reference": "the language reference, as in help('topics')",
  "prose/docstrings": "docstrings of modules that no family of code uses",
  "code": "general modules such as argparse, dataclasses and tarfile",
  "code/network": "protocols, clients and servers such as asyncio, email and http",
  "code/data": "formats and containers such as json, xml and datetime",
  "code/tools": "testing, logging, importing, debugging and process pools",
}

# Modules and packages by name, so that a module that became a package in a later Python stays where it is.
# `code` has all top-level modules that are in no list.
_MODULES = {
  "prose/docstrings": """
    __future__ _collections_abc _pydecimal _pyio _strptime _threading_local abc base64 bisect bz2 calendar cmd code
    codecs codeop contextlib copy ctypes difflib enum fileinput filecmp fnmatch fractions functools genericpath getopt
    getpass glob graphlib gzip hashlib heapq hmac inspect io ipaddress linecache locale lzma numbers operator optparse
    os pathlib pkgutil platform pprint queue random re rlcompleter runpy sched secrets shutil site stat string symtable
    tempfile textwrap threading timeit traceback types typing uuid warnings weakref zipapp""",
  "code/network": """
    asyncio email ftplib http imaplib mailbox nntplib poplib selectors smtpd smtplib socket socketserver ssl telnetlib
    urllib webbrowser wsgiref xmlrpc""",
  "code/data": """
    _pydatetime collections configparser csv datetime dbm html json pickle pickletools plistlib shelve sqlite3
    statistics tomllib xml zoneinfo""",
  "code/tools": """
    bdb cProfile compileall concurrent doctest importlib logging modulefinder multiprocessing pdb profile pstats
    py_compile pyclbr tabnanny trace tracemalloc unittest venv""",
}
_REFERENCE = "pydoc_data/topics.py"
_NOT_CODE = {"antigravity", "this", "turtle"}  # jokes, and a module that comes and goes with tkinter
_SKIPPED_FOLDERS = {"test", "tests", "__pycache__", "site-packages"}
_PARSING = threading.Lock()  # Python 3.11 counts its recursion in one place for all threads, and raises SystemError
_MIN_CHARS = 200  # shorter texts are stubs, often the same in several packages
_MIN_BYTES = 100_000  # every complete build has twice that


def open_family(source: config.StandardLibrary, invalid_utf8: str = "error", stdlib: Path | None = None) -> Corpus:
  """The documents of a family: one per source file, or per topic of the reference.

  Args:
    source: names one of `FAMILIES`.
    invalid_utf8: of no use, since sources that are not UTF-8 are left out.
    stdlib: the folder of a standard library; the running Python's own by default.

  Raises:
    ValueError: the family is unknown, or the installation lacks its source files.
  """
  family = source.family
  checks.one_of("StandardLibrary.family", family, FAMILIES)
  stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
  texts = files(family, stdlib)
  size = _num_bytes(texts.values())
  checks.require(size >= _MIN_BYTES, "StandardLibrary.family", family,
                 f"at least {_MIN_BYTES} bytes of its source files in {stdlib}, but found {size}",
                 "use a Python installed with the sources of its standard library, or Files")
  found = _split(texts)
  fingerprint = hashlib.sha256(repr(found).encode()).hexdigest()
  return Corpus(f"stdlib {family}", fingerprint, lambda: iter(found))


def files(family: str, stdlib: Path) -> dict[str, str]:
  """The texts of `family` by the name of their file (and topic), as far as `stdlib` has them."""
  if family == "prose/reference":
    texts = _topics(stdlib)
  else:
    names = _other_modules(stdlib) if family == "code" else _MODULES[family].split()
    texts = {name: text for module in names for name, text in _sources(stdlib, module).items()}
    if family == "prose/docstrings":
      texts = {name: _docstrings(text) for name, text in texts.items()}
  return {name: text for name, text in texts.items() if len(text) >= _MIN_CHARS}


def _other_modules(stdlib: Path) -> list[str]:
  """Top-level modules, packages left out, that no list names."""
  named = _NOT_CODE.union(" ".join(_MODULES.values()).split())
  # The names that Python itself lists: none that a build generates or a distribution adds.
  return [name for name in sorted(sys.stdlib_module_names - named) if (stdlib / f"{name}.py").is_file()]


def _sources(stdlib: Path, module: str) -> dict[str, str]:
  """The source of each file of a module or package, by relative name; none where the build lacks it."""
  sources = {}
  for path in [stdlib / f"{module}.py", *sorted((stdlib / module).rglob("*.py"))]:
    name = path.relative_to(stdlib)
    if path.is_file() and not _SKIPPED_FOLDERS.intersection(name.parts):
      try:
        sources[name.as_posix()] = path.read_text(encoding="utf-8").strip("\n")
      except UnicodeDecodeError:
        continue  # a few sources declare another encoding
  return sources


def _docstrings(source: str) -> str:
  """The docstrings of a module, its classes and functions, in the order in which `ast` walks them."""
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  found = (ast.get_docstring(node, clean=False) for node in ast.walk(_parse(source)) if isinstance(node, kinds))
  return "\n".join(inspect.cleandoc(docstring) for docstring in found if docstring)


def _parse(source: str) -> ast.Module:
  with _PARSING:
    return ast.parse(source)


def _topics(stdlib: Path) -> dict[str, str]:
  """The topics of the reference, each without the paragraphs that a shorter topic has already.

  Topics quote one another at length (`compound` repeats `if`, `for` and `while`), which would put
  the same paragraphs into different splits.
  """
  if not (stdlib / _REFERENCE).is_file():
    return {}
  module = _parse((stdlib / _REFERENCE).read_text(encoding="utf-8"))
  topics = next(ast.literal_eval(node.value) for node in module.body if isinstance(node, ast.Assign))
  texts: dict[str, str] = {}
  seen: set[str] = set()
  for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
    paragraphs = {" ".join(p.split()): p for p in re.split(r"\n\s*\n", topics[topic].strip("\n"))}
    texts[f"{_REFERENCE}:{topic}"] = "\n\n".join(p for words, p in paragraphs.items() if words not in seen)
    seen.update(paragraphs)
  return texts


def _split(texts: dict[str, str]) -> list[Document]:
  """Fills test, then valid, each to 5 % of all bytes, with files in the order of their names' SHA-256.

  Only files up to half that size are taken, so that neither split is a single long file.
  """
  goal = _num_bytes(texts.values()) / 20
  parts: dict[str, list[str]] = {name: [] for name in SPLITS}
  for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
    fits = _num_bytes([texts[name]]) <= goal / 2
    chosen = next((part for part in ("test", "valid") if fits and _num_bytes(parts[part]) < goal), "train")
    parts[chosen].append(texts[name])
  return [Document(text, split) for split in SPLITS for text in parts[split]]


def _num_bytes(texts: Iterable[str]) -> int:
  return sum(len(text.encode()) for text in texts)
