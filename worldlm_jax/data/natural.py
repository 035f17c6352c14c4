"""Recipes: which documents of The Pile, and which languages of mC4, go to which node of a tree.

**The Pile** (Gao et al., arXiv:2101.00027) is no longer distributed as it was. Its successor
`monology/pile-uncopyrighted` on the Hugging Face hub leaves out Books3, BookCorpus2, OpenSubtitles,
YoutubeSubtitles and OpenWebText2, so these five of its 22 parts are missing here too. Of the rest, in GiB of
text (Table 1 there): Pile-CC 227, Github 95, PubMed Central 90, ArXiv 56, FreeLaw 51, StackExchange 32,
USPTO Backgrounds 23, PubMed Abstracts 19, Gutenberg (PG-19) 11, DM Mathematics 7.8, Wikipedia (en) 6.4,
Ubuntu IRC 5.5, EuroParl 4.6, HackerNews 3.9, PhilPapers 2.4, NIH ExPorter 1.9, Enron Emails 0.9. The train
files repeat most parts, up to three times (its column "epochs").

**mC4** (Xue et al., arXiv:2010.11934) is `allenai/c4` on the hub, 9.7 TB in the revision used here. How much
there is of a language shows in the number of its train files, given below: 2 for Xhosa, 11,264 for English. The
names are the data set's own: Hebrew is "iw". It comes with two splits; the second is divided into valid and test.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import fsspec

from worldlm_jax import checks
from worldlm_jax.data import documents

HELD_OUT = "valid and test"  # stands for a split: half of the documents each, by their hash


class File(NamedTuple):
  """What tells whether a file has changed, as far as its source knows."""

  bytes: int
  checksum: str  # "": not known


class Input(NamedTuple):
  """One file of a corpus, by its name."""

  name: str  # within the corpus, such as "train/00.jsonl.zst"
  split: str  # of all its documents: one of documents.SPLITS, or HELD_OUT
  number: int
  tag: str  # of all its documents; "": each says its own

  @property
  def splits(self) -> tuple[str, ...]:
    """Where its documents may go."""
    return ("valid", "test") if self.split == HELD_OUT else (self.split,)

  def split_of(self, encoded: bytes) -> str:
    """The split of one of its documents, given in UTF-8."""
    return self.splits[documents.digest(encoded) * len(self.splits) >> 64]


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
  """A corpus of compressed JSON lines, and the tree that it becomes."""

  source: str  # where it is, for fsspec
  folders: tuple[str, ...]  # of the source, those that hold input files
  patterns: dict[str, str]  # of the input files of each split; the groups are `number` and `tag`
  tag_field: str  # of a document; "": the name of its file says it
  example: str  # the name of an input file
  nodes: dict[str, str]  # path -> tag

  def list_files(self, source: str) -> dict[str, File]:
    """The files of the recipe's folders at `source`, a local folder or an address for fsspec, by name.

    Raises:
      InputError: fsspec cannot open such an address.
      OSError: it cannot be reached.
    """
    try:
      system, root = fsspec.core.url_to_fs(source)
    except (ValueError, ImportError) as error:
      checks.fail("--source", source, "a local folder, or an address that fsspec can open", str(error))
    found = {}
    for folder in self.folders:
      try:
        entries = system.ls(f"{root}/{folder}".rstrip("/"), detail=True)
      except (FileNotFoundError, NotADirectoryError):
        continue
      except Exception as error:  # each file system has errors of its own
        raise OSError(f"{source} cannot be listed ({type(error).__name__}: {error}); without a network, copy it and "
                      "give --source=FOLDER") from error
      for entry in entries:
        if entry["type"] == "file":
          name = f"{folder}/{entry['name'].rpartition('/')[2]}".lstrip("/")
          checksum = (entry.get("lfs") or {}).get("sha256") or entry.get("ETag") or ""
          found[name] = File(entry["size"] or 0, checksum)
    return found

  def inputs(self, names: Iterable[str], nodes: Collection[str]) -> list[Input]:
    """Those of the named files that have documents for `nodes`, in the order in which to read them.

    What is held out comes first, then the train files by number: wherever this stops, each node has some text.
    """
    tags = {self.nodes[path] for path in nodes}
    found = []
    for name in sorted(names):
      for split, pattern in self.patterns.items():
        if match := re.fullmatch(pattern, name):
          groups = match.groupdict()
          tag = groups.get("tag", "")
          if not tag or tag in tags:
            found.append(Input(name, split, int(groups.get("number", 0)), tag))
    return sorted(found, key=lambda item: (item.split == "train", item.number, item.name))

  def select(self, paths: Collection[str]) -> dict[str, str]:
    """The nodes at and below `paths`, all of them if there are none; "." is the root alone."""
    inner = sorted({node.rpartition("/")[0] for node in self.nodes if "/" in node})
    for path in paths:
      checks.one_of("--nodes", path, [*self.nodes, *inner])
    return {node: tag for node, tag in self.nodes.items()
            if not paths or any(node == path or node.startswith(path + "/") for path in paths)}


_MC4_NAME = r"multilingual/c4-(?P<tag>\w+(-Latn)?){}\.tfrecord-(?P<number>\d+)-of-\d+\.json\.gz"

RECIPES = {
  "pile": Recipe(
    # The revision is fixed so that everyone prepares the same documents.
    source="hf://datasets/monology/pile-uncopyrighted@3be90335b66f24456a5d6659d9c8d208c0357119",
    folders=("", "train"),
    patterns={
      "train": r"train/(?P<number>\d+)\.jsonl\.zst", "valid": r"val\.jsonl\.zst", "test": r"test\.jsonl\.zst"
    },
    tag_field="meta.pile_set_name",
    example="train/00.jsonl.zst",
    nodes={
      ".": "Pile-CC",  # general text: the web
      "academic/arxiv": "ArXiv",
      "academic/mathematics": "DM Mathematics",
      "academic/philosophy": "PhilPapers",
      "code/github": "Github",
      "code/stackexchange": "StackExchange",
      "code/ubuntu_irc": "Ubuntu IRC",
      "encyclopedic/gutenberg": "Gutenberg (PG-19)",
      "encyclopedic/wikipedia": "Wikipedia (en)",
      "legal/europarl": "EuroParl",
      "legal/freelaw": "FreeLaw",
      "legal/uspto": "USPTO Backgrounds",
      "medical/nih_exporter": "NIH ExPorter",
      "medical/pubmed_abstracts": "PubMed Abstracts",
      "medical/pubmed_central": "PubMed Central",
      "web/enron": "Enron Emails",
      "web/hackernews": "HackerNews",
    },
  ),
  "mc4": Recipe(
    source="hf://datasets/allenai/c4@1ddc917116b730e1859edef32896ec5c16be51d0",
    folders=("multilingual",),
    patterns={"train": _MC4_NAME.format(""), HELD_OUT: _MC4_NAME.format("-validation")},
    tag_field="",
    example="multilingual/c4-sw.tfrecord-00000-of-00032.json.gz",
    nodes={
      ".": "en",  # 11,264 files
      "bantu/shona": "sn",  # 8; a family without a high-resource language
      "bantu/swahili": "sw",  # 32
      "bantu/xhosa": "xh",  # 2
      "bantu/zulu": "zu",  # 8
      "germanic/dutch": "nl",  # 1,024
      "germanic/frisian": "fy",  # 16
      "germanic/german": "de",  # 2,048
      "germanic/luxembourgish": "lb",  # 32
      "indo_aryan/bengali": "bn",  # 512
      "indo_aryan/gujarati": "gu",  # 64
      "indo_aryan/hindi": "hi",  # 1,024
      "indo_aryan/punjabi": "pa",  # 32
      "romance/corsican": "co",  # 8
      "romance/french": "fr",  # 2,048
      "romance/galician": "gl",  # 128
      "romance/spanish": "es",  # 2,048
      "semitic/amharic": "am",  # 16
      "semitic/arabic": "ar",  # 1,024
      "semitic/hebrew": "iw",  # 1,024
      "semitic/maltese": "mt",  # 128
      "slavic/belarusian": "be",  # 128
      "slavic/macedonian": "mk",  # 128
      "slavic/polish": "pl",  # 1,024
      "slavic/russian": "ru",  # 4,096
      "turkic/azerbaijani": "az",  # 256
      "turkic/kyrgyz": "ky",  # 64
      "turkic/turkish": "tr",  # 1,024
      "turkic/uzbek": "uz",  # 32
      "uralic/estonian": "et",  # 256
      "uralic/finnish": "fi",  # 1,024
      "uralic/hungarian": "hu",  # 1,024
    },
  ),
}
