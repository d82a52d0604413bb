"""What may be wrong with a run though every number is there, counted from its records."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from adv2_jax.validate import printable

NAMED = 20  # files left out that are named, per reason
# health's field -> the records' field
_FIELDS = {
  'zero_gradient': 'zero_gradient',
  'nonfinite_gradient': 'nonfinite_gradient',
  'flat_maps': 'flat_map',
}
_MEANING = {
  'zero_gradient': (
    'with a gradient of 0 at every step looked at',
    'no attack moves them: does the net round, clip or saturate its input?',
  ),
  'nonfinite_gradient': (
    'with a gradient that is not finite at some step',
    'a square root or logarithm of 0 has none, and float16 overflows',
  ),
  'flat_maps': (
    'with a map that is the same everywhere',
    'a distance to it says nothing',
  ),
  'already_at_target': (
    'taken for their target before the attack',
    'their success is none',
  ),
}


class Health:
  """Counts examples, each once, whatever number of attacks and interpreters it went through.

  `stays`: the class is to stay what it is, so that being there before the attack says nothing.
  """

  def __init__(self, stays: bool = False):
    self._stays = stays
    self._ids: dict[str, set[int]] = {name: set() for name in (*_FIELDS, 'already_at_target')}

  def watch(self, attack: str, records: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The same records, looked at as they pass."""
    for record in records:
      for name, field in _FIELDS.items():
        if record.get(field):
          self._ids[name].add(record['id'])
      if attack == 'benign' and record['success'] and not self._stays:
        self._ids['already_at_target'].add(record['id'])
      yield record

  def found(
    self, num_seen: int, num_correct: int | None, omitted: Mapping[str, Sequence[str]]
  ) -> dict[str, Any]:
    """What metrics.json says.

    Args:
      num_seen: images that the classifier has looked at.
      num_correct: of these, those it gets right; None where nobody knows.
      omitted: reason -> files that are no part of the data set.
    """
    return {
      **{name: len(ids) for name, ids in self._ids.items()},
      'clean_accuracy': num_correct / num_seen if num_seen and num_correct is not None else None,
      'num_seen': num_seen,
      'files_left_out': {reason: _named(files) for reason, files in omitted.items() if files},
    }


def _named(files: Sequence[str]) -> list[str]:
  more = [f'and {len(files) - NAMED} more'] if len(files) > NAMED else []
  return [*map(printable, files[:NAMED]), *more]


def sentences(found: Mapping[str, Any]) -> Iterator[str]:
  """A line for each count that is not 0."""
  for name, (what, why) in _MEANING.items():
    if n := found.get(name):
      yield f'examples {what}: {n} ({why})'


def left_out(found: Mapping[str, Any]) -> Iterator[str]:
  """A line for each reason why files are not in use."""
  for reason, files in found.get('files_left_out', {}).items():
    yield f'left out, {reason}: {", ".join(files)}'
