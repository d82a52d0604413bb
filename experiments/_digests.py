"""Fingerprints of every file whose content decides what comes out, compared on --resume."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from adv2_jax.data import Dataset
from adv2_jax.validate import user_path
from adv2_jax.weights import zoo

FILES = ('masks', 'target_map', 'target_label')  # flags that may name a file
CARD = ('mean', 'std', 'class_names', 'classes', 'confidence')  # what counts of a weights' card


def of_inputs(config: Mapping[str, Any], **datasets: Dataset) -> dict[str, str]:
  """{what: digest} of data sets, weights and files of a command's flags.

  Raises:
    InputError: weights that cannot be read.
  """
  found = {name: dataset.digest() for name, dataset in datasets.items()}
  for flag in FILES:
    if config.get(flag) and (path := user_path(config[flag])).is_file():
      found[flag] = hashlib.sha256(path.read_bytes()).hexdigest()
  return found | of_weights(config)


def of_weights(config: Mapping[str, Any]) -> dict[str, str]:
  """The part of `of_inputs` that is known from the flags alone: the weights."""
  sources = {flag: config.get(flag) for flag in ('weights', 'decoder', 'encoder_weights')}
  if config.get('task') != 'classifier':  # which starts from random ones
    sources['weights'] = sources['weights'] or config['model']
  if 'rts' in (config.get('interpreters') or ()):
    own = zoo.built_in_decoder(config['model'], config['weights'])
    sources['decoder'] = sources['decoder'] or own
  return {flag: _weights(source) for flag, source in sources.items() if source}


def _weights(source: str) -> str:
  card = zoo.read_card(zoo.resolve(source))
  known = json.dumps([card.get(field) for field in CARD])
  return hashlib.sha256((zoo.digest(source) + known).encode()).hexdigest()
