import numpy as np
import pytest

from experiments._first_look import FirstLook


def look(labels, predictions, classes=10, scale=5.0, offset=0.0):
  """Logits with a peak at the prediction, and as much of `offset` as all images share."""
  rng, found = np.random.RandomState(0), FirstLook()
  for label, prediction in zip(labels, predictions, strict=True):
    logits = rng.randn(classes) + scale * np.eye(classes)[prediction]
    found.add(np.float32(logits + offset * np.arange(classes)), label)
  return found


LABELS = np.arange(60) % 9
RANDOM = np.random.RandomState(1).randint(0, 10, 60)


@pytest.mark.parametrize(
  ('labels', 'predictions', 'message'),
  [
    (LABELS + 1, LABELS, 'but 60 with -1 added to the labels: the labels seem to count from 1'),
    (LABELS, LABELS + 1, 'but 60 with +1 added to the labels: the classifier seems to have one'),
    (LABELS[:3] + 1, LABELS[:3], 'but 3 with -1 added'),
  ],
)
def test_labels_that_are_one_off(labels, predictions, message):
  """As a csv of a competition has them: nearly all images would be passed over as wrong."""
  assert message in look(labels, predictions).shifted()


@pytest.mark.parametrize(
  ('labels', 'predictions'),
  [(LABELS, LABELS), (LABELS, RANDOM), (LABELS[:1] + 1, LABELS[:1]), (LABELS[:9] * 0 + 1, [0] * 9)],
)
def test_no_word_of_labels_that_are_not_one_off(labels, predictions):
  """One image tells nothing; a net that says the same of all tells nothing, either."""
  assert not look(labels, predictions).shifted()
  assert not FirstLook().shifted()


@pytest.mark.parametrize(
  ('found', 'message'),
  [
    (look(LABELS, RANDOM), 'gets 2 of 60 images right (3.3%), as chance would: check --mean'),
    (look(LABELS, LABELS), ''),
    (look(LABELS[:1], RANDOM[:1]), ''),
    (look([1, 2, 3, 4], [1, 5, 6, 7]), ''),  # too few to tell
    (look(LABELS, np.where(np.arange(60) < 24, LABELS, RANDOM)), ''),  # poor, but no chance
    (look(LABELS[:20] * 0, [0] * 20), ''),  # one class only
    (look([9] * 20, [9] * 20, offset=100, scale=0), 'its logits hardly differ: check --mean'),
    (look([9] * 20, [9] * 20, offset=np.nan), 'its logits hardly differ: check --mean'),
  ],
)
def test_what_looks_like_chance_is_said(found, message):
  """A wrong normalisation; on a set sorted by class a blind net may get all of them right."""
  assert message in found.doubt()
  assert bool(message) == bool(found.doubt())
