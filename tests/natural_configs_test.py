"""Every config of the two natural families: it loads, its tree resolves, and its model has the size of its name."""

import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from worldlm_jax import config as c, federation, model, prepare, trees
from worldlm_jax.data import natural, tokenizer

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES = {"75m": 74_128_896, "125m": 123_685_632, "400m": 405_324_800}
NAMES = [f"{corpus}_{size}" for corpus in natural.RECIPES for size in SIZES]


def _load(name: str) -> c.Config:
  """By its path, as --config does."""
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def _rows(corpus: str, tag: str, name: str) -> Iterator[dict[str, object]]:
  for i in range(12):
    text = f"{tag}, {name}, {i}"
    yield {"text": text, "meta": {"pile_set_name": tag}} if corpus == "pile" else {"text": text, "url": ""}


@pytest.fixture(scope="module", params=natural.RECIPES)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
  """A corpus, and the tree prepared from a tiny copy of all of it."""
  corpus, folder = request.param, tmp_path_factory.mktemp(request.param)
  tags = natural.RECIPES[corpus].nodes.values()
  if corpus == "pile":
    names = {name: list(tags) for name in ("train/00.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst")}
  else:
    names = {f"multilingual/c4-{tag}{kind}.tfrecord-00000-of-00001.json.gz": [tag]
             for tag in tags for kind in ("", "-validation")}
  for name, those in names.items():
    file = folder / "source" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for tag in those for row in _rows(corpus, tag, name)).encode()
    if corpus == "pile":
      with pa.CompressedOutputStream(str(file), "zstd") as stream:
        stream.write(content)
    else:
      file.write_bytes(gzip.compress(content))
  prepare.prepare(corpus, str(folder / "tree"), str(folder / "source"))
  return corpus, folder / "tree"


def test_both_families_have_every_size() -> None:
  assert {file.stem for corpus in natural.RECIPES for file in CONFIGS.glob(f"{corpus}_*.py")} == set(NAMES)


@pytest.mark.parametrize("size", SIZES)
def test_the_tree_resolves_to_the_nodes_of_the_recipe(prepared: tuple[str, Path], size: str) -> None:
  corpus, tree = prepared
  config = _load(f"{corpus}_{size}")
  assert config.federation.folder == f"data/{corpus}"
  config.federation.folder = str(tree)
  resolved = federation.resolve(config)
  nodes = natural.RECIPES[corpus].nodes
  assert {m.path for m in resolved.members if m.data} == set(nodes)
  families = {path.split("/")[0] for path in nodes} - {"."}
  assert {m.path for m in resolved.members if not m.data} == families | {"./"}  # the root's text is one of its members
  assert [len(level) for level in resolved.levels] == [1, len(families) + 1, len(nodes) - 1]
  assert all(m.data == c.Files(str(tree / m.path) if m.path != "." else str(tree)) for m in resolved.members if m.data)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_the_size_of_the_name(name: str) -> None:
  config = _load(name)
  arch = model.architecture(config.model, tokenizer.ByteTokenizer().vocab_size)
  assert trees.num_parameters(model.abstract_params(arch)) == SIZES[name.split("_")[1]]
  assert config.node.batch_size % config.optimizer.microbatch_size == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_text_at_the_top_tells_how_to_run_it(name: str) -> None:
  corpus, size = name.split("_")
  config = _load(name)
  text = (CONFIGS / f"{name}.py").read_text()
  assert f"--config=configs/{name}.py --workdir=runs/{name}" in text
  assert f"launch/prepare.sh --corpus={corpus} --out={config.federation.folder} " in text
  assert config.data.tokenizer in text.split('"""')[1]
  # The sizes of a family share what is prepared.
  commands = {(CONFIGS / f"{corpus}_{other}.py").read_text().split("launch/prepare.sh")[1].split("\n")[0]
              for other in SIZES}
  assert len(commands) == 1
  windows = config.node.batch_size * len(natural.RECIPES[corpus].nodes)
  steps = config.rounds * config.node.local_steps
  tokens = windows * steps * config.data.sequence_length
  assert 256 <= windows <= 272 and f"{tokens / 1e9:.1f} billion tokens" in text
  assert f"{8 * SIZES[size] * tokens:.1e} operations".replace("e+", "e") in text
