"""Reads a source of the config into documents: text files, or families of the standard library.

Text files are UTF-8 with any kind of line end; documents are separated by blank lines.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worldlm_jax import checks, config
from worldlm_jax.data import stdlib
from worldlm_jax.data.documents import SPLITS, Documents

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


def read(source: config.Source) -> Documents:
  """The documents of `source`. Raises `ValueError` where text is missing or unreadable."""
  readers: dict[type, Callable[[Any], Documents]] = {
    config.Files: lambda source: read_text(source.path),
    config.StandardLibrary: lambda source: stdlib.read(source.family),
  }
  checks.require(type(source) in readers, "data", source, " or ".join(kind.__name__ for kind in readers))
  return readers[type(source)](source)


def read_text(path: str) -> Documents:
  """The documents of a folder (or of one .txt file) at `path`.

  A folder with train.txt, valid.txt and test.txt is taken as it is split; its other files are ignored.
  The documents of any other folder's *.txt, sub-folders left out, are split 90/5/5 by `split`.

  Raises:
    ValueError: nothing to read at `path`, one of the three files is missing, a file cannot be read or
      is not UTF-8, a split has no document, or fewer than 3 distinct documents are there to be split.
  """
  folder = Path(path).expanduser()
  remedy = "correct the path; a relative one starts from the current directory"
  checks.require(bool(path) and folder.exists(), "Files.path", path, "an existing folder or .txt file", remedy)
  if folder.is_dir():
    fixed = {name: folder / f"{name}.txt" for name in SPLITS}
    missing = [file.name for file in fixed.values() if not file.is_file()]
    if len(missing) < len(SPLITS):
      checks.require(not missing, "Files.path", path, f"all of train.txt, valid.txt and test.txt, but it lacks "
                     f"{', '.join(missing)}", "add it, or rename the others to have all .txt files split 90/5/5")
      return _read_splits(fixed)
    files = sorted(file for file in folder.glob("*.txt") if file.is_file())
  else:
    files = [folder] if folder.suffix == ".txt" else []
  checks.require(bool(files), "Files.path", path, "a .txt file or a folder that holds .txt files",
                 "put train.txt, valid.txt and test.txt there, or any .txt files to be split 90/5/5")
  return split([document for file in files for document in _read_file(file)], path)


def split(documents: list[str], path: str) -> Documents:
  """Splits the distinct documents 90/5/5, at least one to each split, in the order of their SHA-256.

  The split depends on the set of documents alone, not on their order, and exact duplicates stay together.
  `path` names the source in errors and origins.
  """
  groups: dict[str, list[str]] = {}
  for document in documents:
    groups.setdefault(hashlib.sha256(document.encode()).hexdigest(), []).append(document)
  count = len(groups)
  checks.require(count >= 3, "Files.path", path, f"at least 3 distinct documents to split, but it has {count}",
                 "separate documents by blank lines, or split them yourself into train.txt, valid.txt and test.txt")
  end_of_train = min(count * 90 // 100, count - 2)
  end_of_valid = max(end_of_train + 1, min(count * 95 // 100, count - 1))
  ordered = [groups[digest] for digest in sorted(groups)]
  parts = ordered[:end_of_train], ordered[end_of_train:end_of_valid], ordered[end_of_valid:]
  train, valid, test = (tuple(document for group in part for document in group) for part in parts)
  return Documents(train, valid, test, {name: f"{path} ({name} part of its documents)" for name in SPLITS})


def _read_splits(files: dict[str, Path]) -> Documents:
  """The documents of the three files, each of which must hold some."""
  parts = {name: tuple(_read_file(file)) for name, file in files.items()}
  for name, part in parts.items():
    checks.require(bool(part), f"{name} file", str(files[name]), "at least one document, but it is blank",
                   "put text into it, or remove the three files to have other .txt files split 90/5/5")
  return Documents(**parts, origins={name: str(file) for name, file in files.items()})


def _read_file(file: Path) -> list[str]:
  """The documents of one file that are not empty, without the line ends around them."""
  try:
    text = file.read_bytes().decode().removeprefix("\ufeff")
  except OSError as error:
    checks.fail("text file", str(file), f"a readable file ({error.strerror or error})", "check its permissions")
  except UnicodeDecodeError as error:
    checks.fail("text file", str(file), f"UTF-8, but byte {error.start} is not", "convert it, for example with iconv")
  text = text.replace("\r\n", "\n").replace("\r", "\n")
  # The outer line ends let a blank first or last line, even one of spaces, be found as such.
  documents = _BLANK_LINES.split(f"\n{text}\n")
  return [document.strip("\n") for document in documents if document.strip()]
