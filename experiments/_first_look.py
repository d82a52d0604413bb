"""Whether a classifier and its data fit together, as far as its logits tell."""

import math
from typing import Any

import numpy as np

from adv2_jax.data.base import FROM_MINUS_ONE, FROM_ONE


class FirstLook:
  """What the classifier says of the images gone through, and what is suspicious about it."""

  def __init__(self):
    self.n = self.num_classes = 0
    self._right: dict[int, list[int]] = {0: [], -1: [], 1: []}  # with that added to the labels
    self._sum: Any = 0.0  # of the logits, less their mean over classes
    self._squares: Any = 0.0

  def add(self, logits: np.ndarray, label: int) -> None:
    """Another image: its logits f32[K]."""
    self.n, self.num_classes, best = self.n + 1, len(logits), int(logits.argmax())
    for shift, right in self._right.items():
      if best == label + shift:
        right.append(best)
    logits = logits.astype(np.float64) - logits.mean(dtype=np.float64)
    self._sum, self._squares = self._sum + logits, self._squares + logits**2

  def right(self, shift: int = 0) -> int:
    """How many are right, with that added to the labels."""
    return len(self._right[shift])

  def told(self) -> str:
    """The accuracy, in words."""
    share = f' ({self.right() / self.n:.1%})' if self.n else ''
    return f'the classifier gets {self.right()} of {self.n} images right{share}'

  def shifted(self) -> str:
    """What to do about labels that are one too high or too low; '' where they are not."""
    for shift, remedy in ((-1, FROM_ONE), (1, FROM_MINUS_ONE)):
      found = self.right(shift)
      several = len(set(self._right[shift])) > 1  # or a net that always says the same would do
      if several and found > max(self.n / 2, 2 * self.right()) and self._beats_chance(found):
        return f'but {found} with {shift:+d} added to the labels: {remedy}'
    return ''

  def doubt(self) -> str:
    """What looks like chance; '' where nothing does."""
    if self.n < 2:
      return ''
    mean = self._sum / self.n
    differ = np.sqrt(np.maximum(np.mean(self._squares / self.n - mean**2), 0))
    # That is 1 or more in trained nets, .1 on images of one class, and .03 in nets that are blind.
    if not differ > 0.05 * np.sqrt(np.mean(mean**2)):
      return f'{self.told()}, but its logits hardly differ: check --mean, --std and --weights'
    half = (1 + 1 / self.num_classes) / 2  # of the way from chance to perfection
    if not self._beats_chance(self.right()) and self._differs(self.right(), half):
      return f'{self.told()}, as chance would: check --mean, --std, --weights and --label_key'
    return ''

  def _beats_chance(self, right: int) -> bool:
    chance = 1 / self.num_classes
    return right / self.n > chance and self._differs(right, chance)

  def _differs(self, right: int, than: float) -> bool:
    """Whether an accuracy of `than` would hardly give this: Chernoff's bound, 1 %."""
    found = right / self.n
    terms = ((found, than), (1 - found, 1 - than))
    return self.n * sum(p * math.log(p / q) for p, q in terms if p) > math.log(100)
