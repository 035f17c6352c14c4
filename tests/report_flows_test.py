"""The receipts of a run as a part of its page."""

from worldlm_jax.reporting import files, flows

TREE = files.Tree.of({
  ".": {"parent": None, "name": "world"}, "a": {"parent": ".", "name": "a"},
  "a/<p>": {"parent": "a", "name": "<p>"}, "a/q": {"parent": "a", "name": "q"},
})


def receipt(source, reader, decision="sent", rule="", **fields):
  line = {"round": 0, "phase": "up", "from": source, "to": reader, "part": "backbone", "bytes": 2000, "norm": 1.5,
          "privacy_cost": None, "decision": decision, "rule": rule, "weight": 0.5, "reach": None}
  return line | fields


def test_flows_add_up_and_rules_are_named():
  rule = "share_key_layers=<b> of a/<p>"
  html = flows.section([
    receipt("a/<p>", "a"), receipt("a/<p>", "a", norm=2.5), receipt("a/q", "a", "capped", "member_weight_cap=0.5 of a"),
    receipt("a/<p>", "a", "withheld", rule, part="key_layers", bytes=0, norm=None, weight=None),
    receipt("a/q", "a/<p>", phase="attention", part="key_layers", bytes=0, norm=None, weight=0.25),
    receipt("a/<p>", "a/q", "withheld", rule, phase="attention", part="key_layers", bytes=0, norm=None, weight=None),
    receipt("a", ".", rule="share_backbone=a of a", reach="a"), receipt("elsewhere", "a"),
  ], TREE)
  assert "<p>" not in html.replace("</p>", "").replace('<p class="note">', "") and "&lt;b&gt;" in html
  assert "4 kB ✕" in html and ">•<" in html and ">✕<" in html
  assert "sent, as far as a" in html and "capped" in html and "withheld" in html
  cells = html.split("All that was given")[1]
  assert ">2<" in cells and ">2</td>" in cells and ">0.25<" in cells  # twice, with a mean norm of 2
  assert "elsewhere" not in html


def test_without_rules_it_says_so_and_without_receipts_nothing():
  assert "no rule of any node restricted anything" in flows.section([receipt("a/q", "a")], TREE)
  assert flows.section([], TREE) == ""
