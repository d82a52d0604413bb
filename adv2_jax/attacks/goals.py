"""What an attack is after: a class, a map, or both; recipes and judges ask it."""

from typing import NamedTuple

import jax.numpy as jnp

from adv2_jax import losses
from adv2_jax.types import Array, InputError, Label, MapDistance, PredictionLoss

NAMES = ('deceive', 'map_only', 'class_only')
AWAY: dict[str, MapDistance] = {'away': losses.top_mass, 'away_centre': losses.centre_kept}


class Goal(NamedTuple):
  """A goal, by value: the same one gives the same recipe.

  Attributes:
    name: 'deceive': a wrong class, explained by the target map; 'map_only': the true class, which
      is `Batch.target`, explained by the target map; 'class_only': a wrong class.
    untargeted: any wrong class will do, the one that leads is explained, and `Batch.target` is the
      true class, to be left.
    away: how much is left of the map in `Batch.target_map`, which is the benign one, to be made
      small; None: the map is to come close to it.
  """

  name: str = 'deceive'
  untargeted: bool = False
  away: MapDistance | None = None

  @property
  def holds(self) -> bool:
    """Whether the class is to stay what it is."""
    return self.name == 'map_only'

  def prediction(self, loss: PredictionLoss) -> PredictionLoss:
    """That loss, of what is to be predicted."""
    return losses.untargeted(loss) if self.untargeted else loss

  def distance(self, otherwise: MapDistance) -> MapDistance:
    """l_int: `otherwise`, unless the map is to go away."""
    return self.away or otherwise

  def explained(self, logits: Array, target: Label) -> Label:
    """The class whose map counts, i32[B]: the one that the analyst sees once there is success."""
    return losses.runner_up(logits, target) if self.untargeted else target

  def success(self, logits: Array, target: Label) -> Array:
    """Whether what is predicted is what is wanted, bool[B]."""
    return (jnp.argmax(logits, axis=-1) == target) != self.untargeted


DECEIVE = Goal()


def find(name: str, target_map: object = None, *, untargeted: bool = False) -> Goal:
  """The goal of that name; `target_map` may be 'away' (top-k) or 'away_centre'.

  Raises:
    InputError: an unknown name, or a combination that makes no sense.
  """
  if name not in NAMES:
    raise InputError(f'goal is {name!r}; expected one of {", ".join(NAMES)}')
  kind = target_map if isinstance(target_map, str) else None
  if kind in AWAY and name != 'map_only':
    raise InputError(
      f"target_map {kind!r} goes with goal 'map_only', not {name!r}: there the benign map is to be "
      'left, here one is to be reached'
    )
  return Goal(name, untargeted and name != 'map_only', AWAY.get(kind or ''))
