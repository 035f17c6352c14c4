"""WorldLM: nodes share their federation's model, then go their own way, and attend to what others learn.

After A. Iacob, L. Sani, B. Marino, P. Aleksandrov, W. F. Shen, N. D. Lane, "Worldwide Federated Training of
Language Models", arXiv:2405.14446.

  down   B_q <- B_p while q shares it
         K_q <- K_p while q shares them, else attend(K_q, memory + residual layers routed to q), and B_q with it
  up     B_p <- server_optimizer(B_p, mean_c D_c);  K_p <- K_p + mean_c D_c     D: changes since the down-phase

How long a node shares is ours (`exchange/relevance.py`), and so is attention over updates (`attend_updates.py`), in
which the memory is how far everybody's model has moved, and B_q attends as well. With attention over layers
(`attend_layers.py`) the memory is {K_q, K_p}, and {K_c} + {K_p if p trained} in the up-phase, where it takes the place
of the mean.
"""

from worldlm_jax import model, trees
from worldlm_jax.algorithms.attend_layers import AttendLayers
from worldlm_jax.algorithms.attend_updates import AttendUpdates
from worldlm_jax.algorithms.rules import Algorithm, BackboneRule, KeyLayerRule, take_over
from worldlm_jax.config import Config
from worldlm_jax.exchange import attend, backbone as backbone_lib, robust
from worldlm_jax.federation import Federation, as_given

arrange, has_key_layers = as_given, True
shares = ("backbone", "key_layers")


def make(config: Config, arch: model.Architecture, federation: Federation) -> Algorithm:
  """The pair of rules."""
  server, combine = backbone_lib.server_optimizer(config.backbone), robust.combiner(config.backbone)

  def merge(own, state, below, shares, mesh, noise):
    num_rows = own["final_norm"].shape[0]
    mean = combine(below.update["backbone"], shares, num_rows, mesh)
    mean = mean if noise is None else trees.add(mean, noise)
    return backbone_lib.apply_server_optimizer(server, own, state, mean)

  any_validated = any(member.settings.acceptance == "validated" for member in federation.members)
  trusts = any(member.settings.trust == "validated" for member in federation.members)
  over_updates, added = config.key_layers.values == "updates", attend.added_parts(config.key_layers, config.payload)
  key_layers: KeyLayerRule
  if over_updates:
    key_layers = AttendUpdates(config.key_layers, arch, any_validated, added, combine)
  else:
    key_layers = AttendLayers(config.key_layers, arch, any_validated)
  return Algorithm(
    BackboneRule(take_over, merge), key_layers, shares=shares, tracks=shares, weights=config.backbone.weights,
    needs_validation=trusts or any_validated or config.key_layers.similarity == "validation_loss", trusts=trusts,
    hands_all=trusts or (over_updates and not added), goes_own_way=True,
  )
