"""Joint: the sum of its parts, in one pass; what it refuses; the attack that it makes possible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import adv2_jax as adv2
from adv2_jax import api, interpreters, losses
from adv2_jax.attacks import presets
from adv2_jax.attacks.perturbations import linf_ball
from adv2_jax.interpreters.joint import WEIGHTS
from adv2_jax.types import InputError, example_keys

CLF = tiny.classifier()
X = tiny.images(3)
LABEL = tiny.outputs(CLF, X).logits.argmax(-1)
TARGET = jnp.argsort(tiny.outputs(CLF, X).logits)[:, -2]
KEY = jax.random.key(0)
MASK = interpreters.mask(
  interpreters.MaskConfig(size=4, jitter=0, area=1e-2, blur=5, mask_blur=3, steps=8)
)
PARTS = {'cam': interpreters.cam(), 'grad': interpreters.grad(), 'mask': MASK}


def maps_of(parts, y):
  keys = example_keys(KEY, len(X))
  return {name: api.explain(CLF, part, X, y, keys) for name, part in parts.items()}


def test_its_maps_are_those_of_its_parts_by_name():
  found = interpreters.joint(PARTS).explain(CLF, X, TARGET, KEY)
  assert found.keys() == PARTS.keys()
  for name, maps in maps_of(PARTS, TARGET).items():
    np.testing.assert_allclose(found[name], maps, atol=1e-5)


def test_its_drafts_are_those_of_its_parts():
  jittered = interpreters.mask(MASK.settings._replace(jitter=2))
  parts = {'cam': interpreters.cam(), 'mask': jittered}
  joint = interpreters.joint(parts)
  found = jax.jit(lambda clf: joint.draft(clf, X, TARGET, KEY))(CLF)
  for name, part in parts.items():
    alone = jax.jit(lambda clf, part=part: part.draft(clf, X, TARGET, KEY))(CLF)
    np.testing.assert_allclose(found[name], alone, atol=1e-5)
  whole = jax.jit(lambda clf: jittered.explain(clf, X, TARGET, KEY))(CLF)
  assert np.abs(found['mask'] - whole).max() > 0.05  # of fewer iterations
  assert joint.passes_of_draft == 1 + 2 * (8 // 3)
  dice = interpreters.from_map(lambda p, clf, x, y, keys: (x.mean(-1), None), random=True)
  assert interpreters.joint(parts | {'dice': dice}).draft_fn is None


@pytest.mark.parametrize('weights', [None, {'grad': 3.0}])
def test_its_distance_and_gradient_are_the_weighted_sums(weights):
  """By hand, with each part alone; also what it adds of its own, and the classifier's logits."""
  plain = interpreters.from_map(lambda p, clf, x, y, keys: (x.mean(-1), None), name='grey')
  extra = plain.replace(
    unroll_fn=lambda *a: plain.unroll_fn(*a)._replace(extra=a[2].mean((1, 2, 3)))
  )
  parts = PARTS | {'own': extra}
  wanted = maps_of(parts, LABEL)
  joint = interpreters.joint(parts, weights)
  factor = {'own': 1.0, 'cam': 1.0, 'grad': 3.0, 'mask': 1.0} if weights else WEIGHTS | {'own': 1}

  @jax.jit
  def together(clf, x):
    carry = joint.begin(clf, X, TARGET, wanted, KEY)
    seen = joint.unroll(clf, x, TARGET, carry, KEY)
    return jnp.sum(seen.distance + seen.extra), seen

  @jax.jit
  def apart(clf, x):
    total = jnp.zeros(len(x))
    for name, part in parts.items():
      carry = part.begin(clf, X, TARGET, wanted[name], KEY)
      seen = part.unroll(clf, x, TARGET, carry, KEY)
      d = losses.map_rms(seen.maps[0], wanted[name]) if seen.distance is None else seen.distance
      total += factor[name] * d + seen.extra
    return total.sum(), total

  x = 0.9 * X + 0.05
  (g, seen), (h, total) = (jax.grad(f, argnums=1, has_aux=True)(CLF, x) for f in (together, apart))
  np.testing.assert_allclose(seen.distance + seen.extra, total, rtol=1e-4)
  np.testing.assert_allclose(g, h, atol=1e-4 * float(jnp.abs(h).max()))
  np.testing.assert_allclose(seen.logits, tiny.outputs(CLF, x).logits, atol=1e-5)


def test_parts_that_look_at_the_net_share_one_pass():
  clf, traces = tiny.counted(CLF)
  parts = {'cam': interpreters.cam(), 'grad_cam': interpreters.grad_cam(), 'mask': MASK}
  joint = interpreters.joint(parts)
  assert joint.passes == (1 + 1 + 16, 2 + 2 * 4, 1 + 2 * 2)
  carry = joint.begin(clf, X, TARGET, maps_of(parts, LABEL), KEY)
  traces.clear()
  jax.make_jaxpr(lambda x: joint.unroll(clf, x, TARGET, carry, KEY).distance)(X)
  assert traces.count(len(X)) == 1  # MASK's looks are a batch of their own


def test_the_attack_hides_from_all_at_once():
  """One image closer to every target map than plain PGD's, judged by fresh maps."""
  joint = interpreters.joint(PARTS)
  found = adv2.attack(CLF, joint, X, target=TARGET, label=LABEL, epsilon=0.2, steps=60, key=KEY)
  recipe = presets.plain_pgd('fast')
  batch = tiny.batch(X, TARGET)
  plain, _ = api.attack_batch(recipe, CLF, PARTS['cam'], batch, 0.2, KEY)
  hit = np.asarray(found.success)
  assert hit.sum() >= 2
  benign = maps_of(PARTS, LABEL)
  keys = example_keys(KEY, len(X))
  of_plain = api.explain(CLF, joint, plain, TARGET, keys)
  l1 = lambda a, b: float(jnp.abs(a - b)[hit].mean())  # noqa: E731
  for name in PARTS:
    near, far = l1(found.maps[name], benign[name]), l1(of_plain[name], benign[name])
    assert near < 0.8 * far, (name, near, far)
  squares = [losses.map_mse(found.maps[n], benign[n]) for n in PARTS]
  np.testing.assert_allclose(found.terms.interpretation, np.mean(squares, 0), rtol=1e-4, atol=1e-6)
  assert np.abs(np.asarray(found.x) - np.asarray(X)).max() <= 0.2 + 0.5 / 255 + 1e-6


def test_padding_rows_change_nothing_and_a_second_call_compiles_nothing():
  parts = {'cam': PARTS['cam'], 'grad': PARTS['grad']}
  clf, traces = tiny.counted(CLF)
  attack = lambda: adv2.attack(  # noqa: E731
    clf, interpreters.joint(parts), X, target=TARGET, epsilon=0.1, steps=4, pad_to=4, key=KEY
  )
  first = attack()
  traces.clear()
  np.testing.assert_array_equal(attack().x, first.x)
  assert not traces
  alone = adv2.attack(
    clf, interpreters.joint(parts), X, target=TARGET, epsilon=0.1, steps=4, key=KEY
  )
  np.testing.assert_array_equal(alone.x, first.x)


def test_it_is_chosen_by_the_sum_of_the_distances():
  """Of maps made afresh; MASK's own distance, which is of no map, does not count there."""
  batch = tiny.batch(X, TARGET, maps_of(PARTS, LABEL))
  joint = interpreters.joint(PARTS)
  score = presets.closest_map(CLF, joint, KEY, max_log_odds=1e9)
  recipe = presets.fast('joint')
  attack, n = recipe.schedule(CLF, joint, linf_ball(0.1), KEY)[-1]
  assert n == 300
  _, snapshot = jax.jit(lambda b: attack.step(b, attack.init(b, None)))(batch)
  fresh = joint.explain(CLF, snapshot.x, TARGET, KEY)
  by_hand = sum(losses.map_rms(fresh[k], batch.target_map[k]) for k in PARTS)
  np.testing.assert_allclose(score(batch, snapshot), by_hand, rtol=1e-4)


@pytest.mark.parametrize(
  ('parts', 'weights', 'message'),
  [
    ({'cam': PARTS['cam']}, None, 'joint of cam; expected a mapping of two interpreters or more'),
    ({}, None, 'joint of nothing; expected'),
    ([PARTS['cam']], None, 'joint of a list; expected a mapping'),
    (PARTS | {'x': 'cam'}, None, "joint: 'x' is 'cam'; expected an Interpreter"),
    (PARTS | {'x': interpreters.joint(PARTS)}, None, "joint: 'x' is a joint itself"),
    (PARTS, {'rts': 1.0}, "a weight for 'rts'; the parts are cam, grad, mask"),
    (PARTS, {'cam': 0.0}, "the weight of 'cam' is 0.0; expected a number above 0"),
    (PARTS, {'cam': float('nan')}, "the weight of 'cam' is nan"),
    (
      {k: PARTS[k].replace(classes=(i,)) for i, k in enumerate(('cam', 'grad'))},
      None,
      'there is no class that all of them know',
    ),
  ],
)
def test_what_makes_no_joint(parts, weights, message):
  with pytest.raises(InputError, match=message):
    interpreters.joint(parts, weights)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'target_map': jnp.zeros((3, 8, 8))}, 'target_map is one; a joint needs a mapping .*cam, '),
    ({'target_map': {'cam': jnp.zeros((3, 8, 8))}}, 'a mapping of cam; a joint needs .*grad'),
    ({'preset': 'authors'}, "preset 'authors' has no joint attack"),
    ({'framework': 'cw'}, "framework 'cw' has no joint attack so far"),
    (
      {'goal': 'map_only', 'target_map': 'away', 'target': None},
      "joint under preset 'fast' comes close to target maps",
    ),
  ],
)
def test_attacks_on_a_joint_that_make_no_sense(given, message):
  with pytest.raises(InputError, match=message):
    adv2.attack(CLF, interpreters.joint(PARTS), X, **{'target': TARGET, **given})


def test_a_mapping_is_for_a_joint():
  with pytest.raises(InputError, match='a mapping of cam; expected one array of maps'):
    adv2.attack(CLF, PARTS['cam'], X, target=TARGET, target_map={'cam': jnp.zeros((3, 8, 8))})


def test_it_knows_the_classes_that_all_know():
  parts = {
    'cam': PARTS['cam'].replace(classes=(0, 1, 3)),
    'grad': PARTS['grad'].replace(classes=(3, 1)),
    'mask': MASK,
  }
  assert interpreters.joint(parts).classes == (1, 3)
  assert interpreters.joint(PARTS).classes is None
  assert not interpreters.joint(PARTS).exact
