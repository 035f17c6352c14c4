"""Files from elsewhere: whatever is in them, they run nothing, write nowhere else, and are read or refused cleanly."""

import ast
import contextlib
import copy
import gzip
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from array_record.python import array_record_module
from hypothesis import HealthCheck, example, given, settings, strategies as st

import worldlm_jax
from worldlm_jax import (
  algorithms,
  checkpoint,
  checks,
  config as c,
  export,
  federation as federation_lib,
  ledger,
  metrics,
  model,
  partition,
  released,
  report,
  workdir,
)
from worldlm_jax.data import files as data_files, tokenizer as tokenizer_lib, tokenizer_files
from worldlm_jax.model import llama
from worldlm_jax.planning import machines
from worldlm_jax.reporting import files as records

MODULES = sorted(Path(worldlm_jax.__file__).parent.rglob("*.py"))
NO_NAMES = ("..", ".", "/x", "a/../../b", "x\0y", "x\ny", "x\x1b[31m", "x\u2028y", "n" * 300, "\u57ce" * 100)
ODD = (0, -1, 10**30, 1e308, float("nan"), float("inf"), "~no_such_user/x", "x" * 5000, "\ud800", *NO_NAMES)
VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(ODD),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)
NESTED = "[" * 3000 + "]" * 3000


def fuzzed(examples: int = 40) -> settings:
  return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
  """`content` with some bytes deleted, inserted or replaced; perhaps cut short."""
  found = bytearray(content)
  for _ in range(draw(st.integers(1, 4))):
    start, length = draw(st.integers(0, len(found))), draw(st.integers(0, 9))
    found[start : start + length] = draw(st.binary(max_size=9))
  return bytes(found[: draw(st.just(len(found)) | st.integers(0, len(found)))])


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
  """`content` with some of its parts, at any depth, removed or replaced by other values."""
  content = copy.deepcopy(content)
  for _ in range(draw(st.integers(1, 3))):
    places = list(_places(content))
    if places:
      container, key = places[draw(st.integers(0, len(places) - 1))]
      if draw(st.integers(0, 3)):
        container[key] = draw(VALUES)
      else:
        del container[key]
  return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
  for key in list(content if isinstance(content, dict) else range(len(content))):
    yield content, key
    if isinstance(content[key], dict | list):
      yield from _places(content[key])


def changed_json(content: Any) -> st.SearchStrategy[bytes]:
  """Files in the place of a JSON file with `content`."""
  return changed(content).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(content).encode())


def is_refused(action: Callable[[], Any]) -> bool:
  """Whether it is refused, cleanly; any other error than an `InputError` is raised."""
  try:
    action()
  except checks.InputError:
    return True
  return False


def content_of(folder: Path) -> dict[str, bytes | None]:
  return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# Trees.


TREE = {"name": "world", "settings": {"local_steps": 5, "acceptance": "validated"}, "children": [
  {"name": "law", "data": {"files": {"path": "texts", "text_field": "body"}}, "settings": {"clip_norm": 2.0},
   "children": [{"name": "eu", "data": {"stdlib": "code/data"}}]},
  {"name": "c", "data": {"synthetic": {"lineage": "north", "divergence": 0.5}}},
]}


def resolve(path: Path) -> federation_lib.Federation:
  return federation_lib.resolve(c.Config(federation=c.FederationConfig(yaml=str(path))))


@fuzzed(150)
@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode(errors="replace"))
       | damaged(yaml.safe_dump(TREE).encode()) | changed_json(TREE)
       | changed(TREE).map(lambda value: yaml.safe_dump(value).encode(errors="replace")))
@example(b"{name: w, data: {files: ~no_such_user/x}}")
def test_any_tree_is_resolved_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
  path = tmp_path_factory.getbasetemp() / "tree.yaml"
  path.write_bytes(content)
  with contextlib.suppress(checks.InputError):
    for member in resolve(path).members:
      inner = member.path.removesuffix("/")
      assert inner == "." or all(part not in NO_NAMES for part in inner.split("/"))


@pytest.mark.parametrize("text", [
  "!!python/object/apply:os.system ['touch {canary}']", "name: !!python/object/apply:os.system ['touch {canary}']",
  "name: !!python/object/new:os.system ['touch {canary}']", "!!python/name:os.system", "!!python/module:os",
  "&a {name: w, children: [*a, *a]}", "{name: w, children: &a [*a]}", "name: &a [*a]", "&a {*a : 1}", "&a {<<: *a}",
  "{name: w, children: [" * 150, "{name: w, children: [" * 150 + "{name: a, data: {stdlib: code}}" + "]}" * 150,
  NESTED, "{a: " * 3000, "- " * 3000, "2024-13-45", "{name: w, settings: {local_steps: " + "9" * 5000 + "}}",
  "!!int ''", "!!float x", "!!bool x", "!!timestamp x", "? [a]\n: b", "a: b: c",
  "{name: w, data: [&a0 [x], " + ", ".join(f"&a{i + 1} [{', '.join(9 * [f'*a{i}'])}]" for i in range(8)) + "]}",
  "--- a\n--- b", "%YAML 9.9\n---\na", "\0", "\ufffe", "", "{name: w, data: {files: \"\\ud800\"}, children: [1]}",
], ids=map(str, itertools.count()))
@pytest.mark.parametrize("read", [resolve, lambda path: machines.load(str(path))], ids=["tree", "machine"])
def test_yaml_runs_nothing_and_never_grows(tmp_path: Path, text: str, read: Callable[[Path], Any]) -> None:
  (tmp_path / "tree.yaml").write_text(text.replace("{canary}", str(tmp_path / "canary")), errors="surrogatepass")
  with pytest.raises(checks.InputError) as caught:
    read(tmp_path / "tree.yaml")
  assert len(str(caught.value)) < 20_000
  assert [path.name for path in tmp_path.iterdir()] == ["tree.yaml"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_are_no_folders_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
  tree = {"name": "w", "children": [{"name": name, "data": {"files": "texts"}}]}
  (tmp_path / "tree.yaml").write_text(json.dumps(tree))
  (tmp_path / "tags.jsonl").write_text(json.dumps({"text": "t", "tag": name}))
  before = content_of(tmp_path)
  with pytest.raises(checks.InputError, match="name"):
    resolve(tmp_path / "tree.yaml")
  if name != ".":  # the tag of the root
    source = c.Files(str(tmp_path / "tags.jsonl"), node_field="tag")
    with pytest.raises(checks.InputError, match=r"federation\.documents: tag="):
      federation_lib.resolve(c.Config(federation=c.FederationConfig(documents=source)))
  assert content_of(tmp_path) == before


def test_trees_have_a_depth_that_can_be_held(tmp_path: Path) -> None:
  (tmp_path / "tags.jsonl").write_text(json.dumps({"text": "t", "tag": "/".join("x" * 2000)}))
  source = c.Files(str(tmp_path / "tags.jsonl"), node_field="tag")
  with pytest.raises(checks.InputError, match="at most 100 levels"):
    federation_lib.resolve(c.Config(federation=c.FederationConfig(documents=source)))
  deep = tmp_path / "folders"
  (deep / "/".join("x" * 150)).mkdir(parents=True)
  with pytest.raises(checks.InputError, match="at most 100 levels"):
    federation_lib.resolve(c.Config(federation=c.FederationConfig(folder=str(deep))))


@fuzzed()
@given(damaged(yaml.safe_dump({name: getattr(machines.NAMED["h100x64"], name) for name in machines.Machine.__slots__})
               .encode())
       | changed_json({name: getattr(machines.NAMED["h100x64"], name) for name in machines.Machine.__slots__}))
def test_any_machine_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
  path = tmp_path_factory.getbasetemp() / "machine.yaml"
  path.write_bytes(content)
  is_refused(lambda: machines.load(str(path)))


# Work directories.


class Level(NamedTuple):
  """As much of a level's state as a model is read from."""

  params: Any
  trust: Any


def _config() -> c.Config:
  leaves = [c.Node("a", c.Files("texts")), c.Node("b", c.Files("texts"))]
  tiny = c.ModelConfig(num_layers=2, d_model=4, num_heads=1, num_kv_heads=1, d_ff=3, key_layer_share=0.5)
  return c.Config(rounds=2, model=tiny, federation=c.FederationConfig(root=c.Node("world", None, leaves)))


CONFIG = _config()
FEDERATION = federation_lib.resolve(CONFIG)
DESCRIPTION = workdir.describe(CONFIG, FEDERATION, {"a": "1234"})
RECORD = json.loads(json.dumps(DESCRIPTION | {"versions": {"jax": "1"}, "commit": None, "devices": ["cpu"]}))
ROW = {"round": 0, "node": "a", "tokens": 7, "personalised": {"loss_nats": 1.0, "perplexity": 2.7}}
SUMMARY = {"nodes": {"a": {"tokens": 7}}, "tree": {}, "seconds": {}}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A work directory with two checkpoints."""
  folder = tmp_path_factory.mktemp("untrusted") / "run"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(RECORD))
  (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", CONFIG.checkpoint, FEDERATION)
  for number in (1, 2):
    record = vars(ledger.Progress(number, 0, tokens={"a": 7}))
    checkpoints.save(10_000 * number, _state(), record, float(number))
  checkpoints.wait()
  checkpoints.close()
  return folder


def _state() -> Any:
  arch = algorithms.architecture(CONFIG, tokenizer_lib.ByteTokenizer())
  draw, mesh = np.random.default_rng(0), partition.make_mesh(jax.devices()[:1])
  abstract = model.abstract_params(arch)
  levels = [
    Level(jax.tree.map(lambda leaf, n=n: draw.normal(size=(n, *leaf.shape)).astype(np.float32), abstract),
          np.ones(n, np.float32)) for n in (1, 2)
  ]
  return tuple(jax.device_put(level, partition.shardings(level, mesh)) for level in levels)


@pytest.fixture(scope="module")
def in_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
  """A folder whose surroundings are held against what they were."""
  outside = tmp_path_factory.mktemp("outside")
  (outside / "mine.txt").write_text("mine")
  (outside / "run").mkdir()
  yield outside / "run"
  assert sorted(path.name for path in outside.iterdir()) == ["mine.txt", "run"]
  assert (outside / "mine.txt").read_text() == "mine"


@pytest.fixture(autouse=True)
def _no_subprocess(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(workdir, "environment", lambda: {"versions": {"jax": "1"}})


@fuzzed(100)
@given(record=changed_json(RECORD), rows=st.just(b"") | changed_json(ROW) | damaged(b'{"round": 0, "node": "a"}\n' * 3),
       summary=st.none() | changed_json(SUMMARY))
@example(NESTED.encode(), b"", None)
@example(json.dumps(RECORD).encode(), NESTED.encode(), NESTED.encode())
@example(json.dumps(RECORD).encode(), b"3\n\xff", b"[]")
@example(json.dumps(RECORD | {"nodes": {"a": 3}}).encode(), b"", None)
@example(json.dumps(RECORD | {"config": {}}).encode(), b"", None)
def test_any_records_are_those_of_a_run_or_refused(
  in_place: Path, record: bytes, rows: bytes, summary: bytes | None
) -> None:
  for file in in_place.iterdir():
    file.unlink()
  for name, content in (("config.json", record), ("metrics.jsonl", rows), ("summary.json", summary)):
    if content is not None:
      (in_place / name).write_bytes(content)
  before = content_of(in_place)
  assert is_refused(lambda: released.load(in_place, "a"))  # there is no checkpoint
  is_refused(lambda: records.load(in_place))
  assert content_of(in_place) == before
  is_refused(lambda: workdir.claim(in_place, DESCRIPTION, overwrite=False))
  is_refused(lambda: metrics.keep_jsonl(in_place / "metrics.jsonl", lambda row: row.get("round") in (0, 1)))


@pytest.mark.parametrize("damage", [
  {"record": {"nodes": {"a": {"parent": None, "name": "a"}}}}, {"record": {"config": {}}}, {"rows": [{"node": "a"}]},
  {"rows": [ROW | {"personalised": 7}]}, {"summary": {"nodes": 3, "tree": 4, "seconds": 5}},
], ids=str)
def test_a_report_on_other_records_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
  (tmp_path / "config.json").write_text(json.dumps(RECORD | damage.get("record", {})))
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in damage.get("rows", ())))
  if "summary" in damage:
    (tmp_path / "summary.json").write_text(json.dumps(damage["summary"]))
  before = content_of(tmp_path)
  with pytest.raises(checks.InputError, match=str(tmp_path)):
    report.report(tmp_path)
  assert content_of(tmp_path) == before


@pytest.mark.parametrize(("part", "field", "value"), [
  ("data", "sequence_length", "7"), ("data", "tokenizer", 3), ("model", "d_model", 10**30), ("model", "num_layers", -1),
  ("model", "wings", 2), ("model", "tied_head", None), ("data", "packing", "loose"),
])
def test_models_of_other_configurations_are_refused(
  run_folder: Path, tmp_path: Path, part: str, field: str, value: Any
) -> None:
  shutil.copytree(run_folder, tmp_path / "run")
  record = copy.deepcopy(RECORD)
  record["config"][part][field] = value
  (tmp_path / "run" / "config.json").write_text(json.dumps(record))
  assert released.load(run_folder, "a").config.data.sequence_length == 128
  with pytest.raises(checks.InputError):
    released.load(tmp_path / "run", "a")


@pytest.mark.parametrize("content", [b"[]", b"{}", b"\xff", b'{"reason": 3', NESTED.encode(), b"3", b"null", None])
def test_objects_that_lack_what_is_needed_are_refused(tmp_path: Path, content: bytes | None) -> None:
  if content is not None:
    (tmp_path / "stopped.json").write_bytes(content)
  with pytest.raises(checks.InputError, match=r"stopped\.json"):
    checks.read_object(tmp_path / "stopped.json", "reason")


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "../", "a/../../escaped", "x\0", "n" * 300])
def test_nothing_is_exported_to_another_folder(run_folder: Path, tmp_path: Path, name: str) -> None:
  copied = tmp_path / "deep" / "run"
  shutil.copytree(run_folder, copied)
  record = copy.deepcopy(RECORD)
  record["nodes"] = {".": record["nodes"]["."], name: record["nodes"]["a"], "b": record["nodes"]["b"]}
  (copied / "config.json").write_text(json.dumps(record))
  before = content_of(tmp_path)
  with pytest.raises(checks.InputError, match="a node whose path can be that of a folder"):
    export.export(copied, [], tmp_path / "deep" / "out")
  assert content_of(tmp_path) == before and not Path("/escaped").exists()


@pytest.mark.parametrize("link", ["lock", "config.json.new", "metrics.jsonl", "checkpoints", "report",
                                  "report.html.new", "checkpoints/10000/sizes.json.new", "dangling"])
def test_links_out_of_a_work_directory_are_not_followed(run_folder: Path, tmp_path: Path, link: str) -> None:
  copied, outside = tmp_path / "run", tmp_path / "outside"
  shutil.copytree(run_folder, copied)
  outside.mkdir()
  (outside / "file").write_text("mine")
  place = copied / link
  if place.is_dir():
    shutil.rmtree(place)
  place.unlink(missing_ok=True)
  is_folder = link in ("checkpoints", "report")
  place.symlink_to(outside if is_folder else outside / ("file" if link != "dangling" else "made"))
  for action in (lambda: report.report(copied), lambda: workdir.claim(copied, DESCRIPTION, overwrite=True),
                 lambda: workdir.held(copied).__enter__()):
    with pytest.raises(checks.InputError, match="a folder without links that lead out of it"):
      action()
  assert content_of(outside) == {str(outside / "file"): b"mine"}


def test_links_within_a_work_directory_and_to_it_are_fine(run_folder: Path, tmp_path: Path) -> None:
  shutil.copytree(run_folder, tmp_path / "run")
  (tmp_path / "run" / "newest").symlink_to("checkpoints/20000")
  (tmp_path / "run" / "wandb" / "logs").mkdir(parents=True)
  (tmp_path / "run" / "wandb" / "logs" / "core.log").symlink_to(tmp_path / "log of Weights & Biases")
  (tmp_path / "link").symlink_to(tmp_path / "run")
  workdir.claim(tmp_path / "link", DESCRIPTION, overwrite=False)


def _damage(folder: Path, choose: st.DataObject) -> None:
  """Changes some of the files under a folder of checkpoints, and perhaps the note of their sizes."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  for _ in range(choose.draw(st.integers(1, 3))):
    victim = files[choose.draw(st.integers(0, len(files) - 1))]
    if not victim.exists():
      continue
    if choose.draw(st.booleans()):
      victim.write_bytes(choose.draw(damaged(victim.read_bytes())))
    else:
      victim.unlink()
  if choose.draw(st.booleans()):  # or else they show most of it
    for note in folder.rglob(checkpoint.SIZES):
      note.unlink()


# Where a read fails, Orbax leaves others behind whose event loop is gone when they end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@fuzzed(12)
@given(choose=st.data())
def test_any_checkpoint_is_restored_or_passed_over(run_folder: Path, in_place: Path, choose: st.DataObject) -> None:
  shutil.rmtree(in_place)
  shutil.copytree(run_folder, in_place)
  _damage(in_place / "checkpoints", choose)
  before = content_of(in_place)
  with contextlib.suppress(checks.InputError):
    assert released.load(in_place, "a").round in (1, 2)
  assert content_of(in_place) == before
  with contextlib.suppress(checks.InputError):
    assert _restored_round(in_place) in (1, 2, None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("record", ["{}", "3", "[]", '{"record_checksum": "99914b93"}'])
def test_a_checkpoint_with_an_empty_record_is_passed_over(run_folder: Path, tmp_path: Path, record: str) -> None:
  shutil.copytree(run_folder, tmp_path / "run")
  newest = tmp_path / "run" / "checkpoints" / "20000"
  (newest / checkpoint.SIZES).unlink()
  (newest / "record" / "metadata").write_text(record)
  assert released.load(tmp_path / "run", "a").round == _restored_round(tmp_path / "run") == 1


def _restored_round(folder: Path) -> int | None:
  """Of the checkpoint that a run goes on with, whose arrays are those saved; None where there is none."""
  state = _state()
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", CONFIG.checkpoint, FEDERATION)
  try:
    found = checkpoints.restore_newest(abstract, lambda line: None)
  finally:
    checkpoints.close()
  if found is None:
    return None
  jax.tree.map(np.testing.assert_array_equal, found.state, state)
  return ledger.progress_of(found.record).round


@fuzzed(60)
@given(changed(json.loads(json.dumps(vars(ledger.Progress(1, 2, {"a": 3}, {"a": 4}))))))
@example({"wings": 2})
@example({"round": "1"})
def test_any_record_of_a_checkpoint_says_where_the_run_stands_or_is_refused(record: dict[str, Any]) -> None:
  with contextlib.suppress(checks.InputError):
    assert isinstance(ledger.progress_of(record).round, int)


# Tokenizers, models and texts.


def use(path: Path) -> None:
  found = tokenizer_lib.load(str(path))
  tokens, starts = found.pack(["text", "\0 <|endoftext|>", "w\u00e9 a"])
  assert len(starts) == 3 and isinstance(found.decode(tokens), str) and max(found.encode("a"), default=0) >= 0


TOKENIZER = json.loads(tokenizer_files.byte_tokenizer().to_str())


@pytest.mark.parametrize("part", [
  {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
  {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
  {"normalizer": {"type": "Prepend", "prepend": ""}},
  {"decoder": {"type": "Strip", "content": "a", "start": 99, "stop": 99}},
  {"model": TOKENIZER["model"] | {"unk_token": "?", "fuse_unk": True, "vocab": {"a": 0}}},
  {"model": TOKENIZER["model"] | {"vocab": TOKENIZER["model"]["vocab"] | {"ab": 2**32 - 1}}},
], ids=["no map", "empty map", "prepend", "strip", "unknown", "large id"])
def test_tokenizers_at_which_the_library_panics_are_refused(tmp_path: Path, part: dict[str, Any]) -> None:
  (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER | part))
  with pytest.raises(checks.InputError, match=r"config\.data\.tokenizer="):
    use(tmp_path / "tokenizer.json")


@fuzzed(60)
@given(choose=st.data())
def test_any_tokenizer_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, choose: st.DataObject) -> None:
  vocabulary = dict(list(TOKENIZER["model"]["vocab"].items())[:40])
  content = TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": vocabulary}}
  path = tmp_path_factory.getbasetemp() / "tokenizer.json"
  path.write_bytes(choose.draw(changed_json(content)))
  is_refused(lambda: use(path))


ARCH = model.architecture(c.ModelConfig(num_layers=1, d_model=4, num_heads=1, num_kv_heads=1, d_ff=3), 5)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("model")
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), model.abstract_params(ARCH))
  llama.write(folder, ARCH, params, 100, {})
  assert (folder / llama.INDEX).exists()
  return folder


@fuzzed(60)
@given(choose=st.data())
def test_any_model_is_read_or_refused(
  model_folder: Path, tmp_path_factory: pytest.TempPathFactory, choose: st.DataObject
) -> None:
  folder = tmp_path_factory.getbasetemp() / "llama"
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(model_folder, folder)
  names = sorted(path.name for path in folder.iterdir())
  victim = folder / choose.draw(st.sampled_from([llama.CONFIG, llama.CONFIG, llama.INDEX, *names]))
  content = victim.read_bytes()
  is_json = victim.suffix == ".json"
  victim.write_bytes(choose.draw(changed_json(json.loads(content)) if is_json else damaged(content)))
  with contextlib.suppress(checks.InputError):
    found = llama.adopted(c.ModelConfig(init_from=str(folder)))
    federation_lib.resolve(c.Config(model=found, federation=CONFIG.federation))
    llama.read(folder, model.architecture(found, 5) if found.num_layers < 9 else ARCH)


@pytest.mark.parametrize(("field", "value"), [
  ("rope_parameters", [1]), ("rope_scaling", 3), ("num_attention_heads", 0), ("hidden_size", True),
  ("num_hidden_layers", 10**9), ("num_key_value_heads", "2"), ("head_dim", [1]), ("rope_theta", "x"),
  ("rope_theta", -1), ("rms_norm_eps", None), ("rms_norm_eps", 10**400), (None, []), (None, 3),
])
def test_models_whose_numbers_are_none_are_refused(tmp_path: Path, field: str | None, value: Any) -> None:
  content = llama.llama_config(ARCH) | {"rope_parameters": None, field: value} if field else value
  (tmp_path / llama.CONFIG).write_text(json.dumps(content))
  with pytest.raises(checks.InputError, match=r"config\.json"):
    llama.model_config(tmp_path)


@pytest.mark.parametrize("where", ["../model.safetensors", "/etc/passwd", "x\0", "x" * 5000, "", ".", 3, None])
def test_weights_lie_in_the_folder_itself(model_folder: Path, tmp_path: Path, where: Any) -> None:
  shutil.copytree(model_folder, tmp_path / "model")
  index = json.loads((model_folder / llama.INDEX).read_text())
  index["weight_map"][llama.EMBEDDING] = where
  (tmp_path / "model" / llama.INDEX).write_text(json.dumps(index))
  with pytest.raises(checks.InputError, match=llama.INDEX):
    llama.read(tmp_path / "model", ARCH)


LINES = b"".join(json.dumps({"text": f"text {i}", "meta": {"tag": i}}).encode() + b"\n" for i in range(9))


def _parquet() -> bytes:
  sink = pa.BufferOutputStream()
  rows = [{"text": f"text {i}", "meta": {"tag": str(i)}} for i in range(99)]
  pq.write_table(pa.Table.from_pylist(rows), sink)
  return sink.getvalue().to_pybytes()


def _array_record(folder: Path) -> bytes:
  writer = array_record_module.ArrayRecordWriter(str(folder / "valid.array_record"), "group_size:3")
  for i in range(9):
    writer.write(f"text {i}".encode())
  writer.close()
  return (folder / "valid.array_record").read_bytes()


TEXTS: dict[str, Callable[[Path], bytes]] = {
  ".txt": lambda _: "one\n\ntw\u00f6\r\n\nthree".encode(), ".jsonl": lambda _: LINES,
  ".jsonl.gz": lambda _: gzip.compress(LINES), ".json.gz": lambda _: gzip.compress(LINES),
  ".jsonl.zst": lambda _: pa.compress(LINES, codec="zstd", asbytes=True), ".parquet": lambda _: _parquet(),
  ".array_record": _array_record,
}


@pytest.mark.parametrize("suffix", data_files.SUFFIXES)
def test_any_text_is_documents_or_refused(tmp_path: Path, suffix: str) -> None:
  valid = TEXTS[suffix](tmp_path)
  path = tmp_path / f"fuzzed{suffix}"
  field = "" if suffix in (".txt", ".array_record") else "meta.tag"

  @fuzzed(50)
  @given(damaged(valid) | st.binary(max_size=30), st.sampled_from(["error", "replace"]))
  @example(valid, "error")
  @example(NESTED.encode(), "replace")
  @example(b"", "error")
  def read(content: bytes, invalid_utf8: str) -> None:
    path.write_bytes(content)

    def documents() -> None:
      for document in data_files.open_files(c.Files(str(path), node_field=field), invalid_utf8).documents():
        document.text.encode(), document.tag.encode()

    refused = is_refused(documents)
    assert not (refused and content == valid)

  read()


@pytest.mark.parametrize("path", ["x" * 5000, "x\0", "~no_such_user/x", "\ud800", ""])
def test_paths_of_nothing_are_refused(path: str) -> None:
  with pytest.raises(checks.InputError, match=r"Files\.path="):
    data_files.open_files(c.Files(path), "error")


# The package's own code.


FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "torch", "joblib", "code")
FORBIDDEN_CALLS = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
                   "yaml.full_load", "yaml.load_all", "importlib.import_module", "torch.load")
# The commands run the package's own modules, by their names in a table.
PERMITTED = {("__main__.py", "runpy.run_module")}


def dangers(tree: ast.AST) -> Iterator[str]:
  """What in a module could run code out of a file."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
      yield from (name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES)
    if isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      if name in FORBIDDEN_CALLS or name.startswith("runpy."):
        yield name
      options = {keyword.arg: keyword.value for keyword in node.keywords}
      for option in ("allow_pickle", "trust_remote_code", "shell"):
        if option in options and ast.unparse(options[option]) != "False":
          yield f"{name}({option})"
    if isinstance(node, ast.Attribute) and node.attr in ("UnsafeLoader", "FullLoader", "Loader"):
      yield ast.unparse(node)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_can_run_what_is_in_a_file(path: Path) -> None:
  found = {(path.name, danger) for danger in dangers(ast.parse(path.read_text(encoding="utf-8")))}
  assert found <= PERMITTED


def test_only_the_config_file_of_a_flag_is_python() -> None:
  """`config_flags` runs it, as the person who names it wants it; nothing else defines such a flag."""
  users = [path.name for path in MODULES if "DEFINE_config_file" in path.read_text(encoding="utf-8")]
  assert users == ["experiment.py"]


@pytest.mark.parametrize("text", [
  "import pickle", "from torch import load", "import marshal as m", "eval(x)", "exec(x)", "yaml.load(x)",
  "os.system(x)", "yaml.load(x, Loader=yaml.UnsafeLoader)", "np.load(x, allow_pickle=True)",
  "subprocess.run(x, shell=True)", "runpy.run_path(x)", "datasets.load_dataset(x, trust_remote_code=True)",
])
def test_what_could_run_code_is_seen(text: str) -> None:
  assert list(dangers(ast.parse(text)))
