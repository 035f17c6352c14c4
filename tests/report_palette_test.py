"""The report's colours: told apart by people with each kind of colour blindness, and readable on their page."""

import itertools

import numpy as np
import pytest

from worldlm_jax.reporting import palette

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISION = {
  "typical": np.eye(3),
  "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
  "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
  "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_LMS = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
          [0.0883024619, 0.2817188376, 0.6299787005]]
TO_OKLAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660]]


def oklab(colour: str, vision: str) -> np.ndarray:
  """What is seen of #rrggbb, in a space where distances are differences."""
  channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
  linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
  seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
  return np.array(TO_OKLAB) @ np.cbrt(np.array(TO_LMS) @ seen)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", palette.THEMES, ids=lambda theme: theme.name)
def test_series_differ(theme: palette.Theme, vision: str) -> None:
  for one, other in itertools.combinations(theme.series, 2):
    assert np.linalg.norm(oklab(one, vision) - oklab(other, vision)) > 0.08, (one, other)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", palette.THEMES, ids=lambda theme: theme.name)
def test_scales_run_one_way_and_gains_differ_from_losses(theme: palette.Theme, vision: str) -> None:
  lightness = [oklab(colour, vision)[0] for colour in theme.scale]
  steps = np.diff(lightness)
  assert (steps > 0.05).all() or (steps < -0.05).all()
  for k in range(3):
    worse, better = oklab(theme.diverging[k], vision), oklab(theme.diverging[-1 - k], vision)
    assert np.linalg.norm(worse - better) > 0.05, theme.diverging[k]


@pytest.mark.parametrize("theme", palette.THEMES, ids=lambda theme: theme.name)
def test_everything_can_be_read(theme: palette.Theme) -> None:
  for colour in theme.series:
    assert palette.contrast(colour, theme.surface) >= 3
  for text, behind in itertools.product((theme.ink, theme.muted), (theme.page, theme.surface)):
    assert palette.contrast(text, behind) >= 4.5
  for stops in (theme.scale, theme.diverging):
    for share in np.linspace(0, 1, 101):
      colour = palette.between(stops, float(share))
      assert palette.contrast(palette.ink_on(colour), colour) >= 4.5


def test_colours_between() -> None:
  assert palette.between(("#000000", "#ffffff"), 0.5) == "#808080"
  assert [palette.between(("#000000", "#102030", "#ffffff"), share) for share in (-1, 0.5, 2)] == [
    "#000000", "#102030", "#ffffff"]
  assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)
