"""adv2_jax: attack, and defend, image classifiers together with the interpreters that explain them.

import adv2_jax as adv2

clf = adv2.load_classifier('scene_resnet')
res = adv2.attack(clf, adv2.interpreters.cam(), x, target=t, epsilon=0.031)
"""

from adv2_jax import (
  data,
  images,
  interpreters,
  losses,
  metrics,
  nets,
)
from adv2_jax.api import AttackResult, attack, attack_batch
from adv2_jax.attacks import frameworks, optimisers, perturbations, presets
from adv2_jax.attacks.loop import adv2, pgd, run, run_chunk, staged, track_best
from adv2_jax.attacks.mask_alternation import adv2_mask
from adv2_jax.classifier import Classifier, check_classifier, from_fn, from_linen, from_nnx
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.overlay import overlay
from adv2_jax.training import rts as saliency
from adv2_jax.types import (
  Attack,
  AttackState,
  Batch,
  InputError,
  Outputs,
  Perturbation,
  Snapshot,
  Terms,
  Unrolled,
)
from adv2_jax.weights.zoo import load_classifier, load_decoder

__version__ = '0.1.0'

__all__ = [
  'Attack',
  'AttackResult',
  'AttackState',
  'Batch',
  'Classifier',
  'InputError',
  'Interpreter',
  'Outputs',
  'Perturbation',
  'Snapshot',
  'Terms',
  'Unrolled',
  'adv2',
  'adv2_mask',
  'attack',
  'attack_batch',
  'check_classifier',
  'data',
  'frameworks',
  'from_fn',
  'from_linen',
  'from_nnx',
  'images',
  'interpreters',
  'load_classifier',
  'load_decoder',
  'losses',
  'metrics',
  'nets',
  'optimisers',
  'overlay',
  'perturbations',
  'pgd',
  'presets',
  'run',
  'run_chunk',
  'saliency',
  'staged',
  'track_best',
]
