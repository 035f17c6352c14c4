"""Laws of the standard library's families, on the running Python and on a made-up one."""

import sysconfig
from concurrent import futures
from pathlib import Path

import pytest

from worldlm_jax import config
from worldlm_jax.data import documents, stdlib

_STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.mark.parametrize("family", stdlib.FAMILIES)
def test_every_family_is_large_enough_and_split_by_file(family):
  found = list(stdlib.open_family(config.StandardLibrary(family)).documents())
  parts = {name: [document.text for document in found if document.split == name] for name in documents.SPLITS}
  sizes = {name: sum(len(text.encode()) for text in part) for name, part in parts.items()}
  total = sum(sizes.values())
  assert total >= 200_000
  for name in ("valid", "test"):
    assert len(parts[name]) >= 3  # not a single long file
    assert sizes[name] >= 8_000 and 0.05 * total <= sizes[name] <= 0.075 * total
  texts = [text for part in parts.values() for text in part]
  assert sorted(texts) == sorted(stdlib.files(family, _STDLIB).values())
  assert len(texts) == len(set(texts))  # no text twice, so none in two splits


def test_no_file_is_in_two_families():
  names = [name.split(":")[0] for family in stdlib.FAMILIES for name in set(stdlib.files(family, _STDLIB))]
  per_file = [name for name in names if name != "pydoc_data/topics.py"]
  assert len(per_file) == len(set(per_file)) > 200
  assert not {part for name in names for part in name.split("/")} & {"test", "tests", "site-packages"}


def test_no_text_is_in_two_families():
  texts = [text for family in stdlib.FAMILIES for text in stdlib.files(family, _STDLIB).values()]
  assert len(texts) == len(set(texts))


def test_no_paragraph_of_the_reference_is_in_two_topics():
  topics = stdlib.files("prose/reference", _STDLIB)
  paragraphs = [p for text in topics.values() for p in {" ".join(p.split()) for p in text.split("\n\n")}]
  assert len(paragraphs) == len(set(paragraphs)) > 500


def _fake_library(folder: Path) -> Path:
  """As Debian packs it: packages missing, and files added that Python does not list."""
  filler = "x = 1  # " + "text " * 60 + "\n"
  for module in ("argparse", "sitecustomize", "_sysconfigdata__x86_64-linux-gnu", "socket", "turtle", "json/decoder",
                 "email/__init__", "email/test/case", "json/__pycache__/old", "logging/stub"):
    file = folder / f"{module}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# {module}\n{filler}" if module != "logging/stub" else "x = 1")
  (folder / "csv.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9" + filler.encode())
  (folder / "abc.py").write_text('"""Module.\n\n    Indented.\n    """\n'
                                 f'class A:\n  """{filler.strip()}"""\n'
                                 '  def f(self):\n    """Method."""\n  x = "not one"\n')
  return folder


def test_a_build_with_other_files(tmp_path):
  library = _fake_library(tmp_path)
  found = {family: set(stdlib.files(family, library)) for family in stdlib.FAMILIES}
  assert found == {
    "prose/reference": set(), "prose/docstrings": {"abc.py"}, "code": {"argparse.py"},
    "code/network": {"socket.py", "email/__init__.py"}, "code/data": {"json/decoder.py"}, "code/tools": set(),
  }


def test_docstrings_are_cleaned_and_in_order(tmp_path):
  text = stdlib.files("prose/docstrings", _fake_library(tmp_path))["abc.py"]
  assert text.startswith("Module.\n\nIndented.\nx = 1  # text text")
  assert text.endswith("text\nMethod.")


def test_an_installation_without_sources(tmp_path):
  with pytest.raises(ValueError, match=r"family='code': expected at least .* but found \d+; use a Python installed"):
    stdlib.open_family(config.StandardLibrary("code"), stdlib=_fake_library(tmp_path))


def test_families_can_be_read_side_by_side():
  families = ["prose/docstrings", "prose/reference"] * 8
  with futures.ThreadPoolExecutor(8) as pool:
    opened = list(pool.map(lambda name: stdlib.open_family(config.StandardLibrary(name)).fingerprint, families))
  assert len(set(opened)) == 2


def test_unknown_family():
  with pytest.raises(ValueError, match=r"family='code/netwrok': expected one of .*did you mean 'code/network'"):
    stdlib.open_family(config.StandardLibrary("code/netwrok"))


def test_the_fingerprint_tells_families_apart_and_stays():
  names = ("code", "code", "code/data")
  first, again, other = (stdlib.open_family(config.StandardLibrary(name)).fingerprint for name in names)
  assert first == again != other
