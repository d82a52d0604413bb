"""`adv2_jax.attack`: what it delivers, what it refuses, and that a second call compiles nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import adv2_jax as adv2
from adv2_jax import api, images
from adv2_jax.attacks import presets
from adv2_jax.types import InputError

CLF = tiny.classifier()
CAM = adv2.interpreters.cam()
EXPLAIN = jax.jit(CAM.explain)
X = tiny.images(3)
LABEL = jnp.argmax(tiny.outputs(CLF, X).logits, -1)
TARGET = jnp.argsort(tiny.outputs(CLF, X).logits)[:, -2]  # the runner-up
KEY = jax.random.key(0)
INPUT = adv2.interpreters.input_x_gradient(pool=4)


def test_the_call_of_the_front_page():
  """A user's own functions in, an attack that works out, judged as documented."""
  weights = jnp.asarray(np.random.RandomState(0).randn(3, 3, 3, 8) * 0.3, jnp.float32)
  params = {
    'kernel': weights,
    'head': jnp.asarray(np.random.RandomState(1).randn(8, 4), jnp.float32),
  }

  def apply(p, x, act=jax.nn.relu):
    dims = ('NHWC', 'HWIO', 'NHWC')
    features = act(
      jax.lax.conv_general_dilated(x - 0.5, p['kernel'], (2, 2), 'SAME', dimension_numbers=dims)
    )
    return head(p, features), {'features': features}

  def head(p, features):
    return features.mean((1, 2)) @ p['head']

  clf = adv2.from_fn(params, apply, head, lambda p, x: apply(p, x, adv2.nets.soft_relu))
  adv2.check_classifier(clf, X)
  interpreter = adv2.interpreters.cam()
  explain = jax.jit(interpreter.explain)
  target = jnp.argsort(tiny.outputs(clf, X).logits)[:, -2]
  wanted = explain(clf, X, jnp.argmax(tiny.outputs(clf, X).logits, -1), KEY)
  result = adv2.attack(clf, interpreter, X, target=target, target_map=wanted, epsilon=0.3, steps=30)
  assert result.success.all()
  before = explain(clf, X, target, KEY)
  closer = adv2.metrics.map_l1(result.maps, wanted) < adv2.metrics.map_l1(before, wanted)
  assert closer.all()


def test_the_result_is_judged_on_the_image_it_delivers():
  result = adv2.attack(CLF, CAM, X, target=TARGET, steps=12, key=KEY)
  levels = np.asarray(result.x) * 255
  np.testing.assert_array_equal(images.from_uint8(np.round(levels)), result.x)
  assert float(jnp.abs(result.x - X).max()) <= 0.031 + 0.5 / 255 + 1e-6
  assert (np.abs(result.x - X).max((1, 2, 3)) > 0.02).all()
  np.testing.assert_allclose(
    result.logits, tiny.outputs(CLF, result.x).logits, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(result.success, jnp.argmax(result.logits, -1) == TARGET)
  maps = EXPLAIN(CLF, result.x, TARGET, KEY)
  np.testing.assert_allclose(result.maps, maps, atol=1e-5)
  benign = EXPLAIN(CLF, X, LABEL, KEY)  # the target map that is taken when none is given
  terms = result.terms
  np.testing.assert_allclose(terms.interpretation, ((maps - benign) ** 2).mean((1, 2)), atol=1e-5)
  nll = -jax.nn.log_softmax(result.logits)[jnp.arange(3), TARGET]
  np.testing.assert_allclose(terms.prediction, nll, rtol=1e-4)
  np.testing.assert_allclose(terms.total, terms.prediction + terms.interpretation, rtol=1e-5)


def test_history_counts_what_was_spent_and_shows_what_was_seen():
  result = adv2.attack(CLF, CAM, X, target=TARGET, steps=23, key=KEY, preset='authors')
  history = result.history
  np.testing.assert_array_equal(history.evaluations[:40], np.arange(10, 401, 10))  # the warm start
  np.testing.assert_array_equal(history.evaluations[40:], [410, 420, 423])
  assert history.terms.total.shape == history.success.shape == (43, 3)
  assert not history.terms.interpretation[:40].any()
  assert (history.terms.interpretation[40:] > 0).all()
  assert (history.terms.prediction[30:40] < history.terms.prediction[0]).all()
  assert history.passes[-1] == 423 * 2  # one forward and one backward pass each
  assert (np.diff(history.passes) > 0).all()


def test_stages_end_when_all_examples_are_done():
  """Whole-batch exit on the host; without it the loop would run its 100 steps."""
  stop = lambda batch, snapshot: jnp.broadcast_to(snapshot.step >= 4, batch.target.shape)  # noqa: E731

  def schedule(clf, interpreter, perturbation, key):
    del interpreter
    tx = adv2.optimisers.sign_momentum(1 / 255)
    return adv2.staged((adv2.pgd(clf, perturbation, tx, key=key, stop=stop), 100))

  recipe = presets.Recipe(adv2.perturbations.linf_ball, schedule)
  result = adv2.attack(CLF, CAM, X, target=TARGET, preset=recipe)
  np.testing.assert_array_equal(result.history.evaluations, [10])
  assert (jnp.abs(result.x - X) <= 4.01 / 255).all()


def test_a_second_call_traces_nothing():
  clf, traces = tiny.counted(CLF)
  call = lambda x, target: adv2.attack(clf, CAM, x, target=target, steps=12, epsilon=0.05)  # noqa: E731
  call(X, TARGET)
  once = len(traces)
  call(X[::-1], TARGET[::-1])
  adv2.attack(clf, CAM, X, target=TARGET, steps=12, epsilon=0.1, key=jax.random.key(9))
  assert len(traces) == once > 0


def test_padded_batches_of_several_sizes_share_one_program():
  """And deliver the same as without padding; so do epsilons and keys of each image."""
  clf, traces = tiny.counted(CLF)
  keys = jax.random.split(KEY, 3)
  options = {'steps': 12, 'epsilon': [0.01, 0.03, 0.1], 'key': keys}
  padded = adv2.attack(clf, CAM, X, target=TARGET, pad_to=4, **options)
  once = len(traces)
  options |= {'epsilon': [0.01, 0.03], 'key': keys[:2]}
  fewer = adv2.attack(clf, CAM, X[:2], target=TARGET[:2], pad_to=4, **options)
  assert len(traces) == once > 0
  assert padded.history.success.shape == (2, 3)
  np.testing.assert_array_equal(padded.x[:2], fewer.x)
  moved = np.abs(padded.x - X).max((1, 2, 3))
  assert (moved <= np.array([0.01, 0.03, 0.1]) + 0.5 / 255 + 1e-6).all()
  assert moved[2] > 0.05


def test_what_makes_figures_meaningless_is_said_and_marked():
  """A net without a gradient, one whose gradient is not finite, targets that are there already."""
  w = jnp.asarray(np.random.RandomState(0).randn(tiny.SIZE**2 * 3, 5), jnp.float32)
  head = lambda w, a: a.reshape(len(a), -1) @ w  # noqa: E731

  def attacked(see, target):
    apply = lambda w, x: (head(w, see(x)), {'features': see(x)})  # noqa: E731
    clf = adv2.from_fn(w, apply, head, apply)
    label = (target + 1) % 5
    return adv2.attack(clf, INPUT, X, target=target, label=label, steps=2, pad_to=4).health

  seen = jnp.argmax(head(w, X), -1)
  with pytest.warns(UserWarning, match='of 3 images') as said:
    health = attacked(lambda x: jnp.round(x * 255) / 255, seen.at[1].set((seen[1] + 1) % 5))
  np.testing.assert_array_equal(health.already_at_target, [True, False, True])
  assert health.zero_gradient.all()
  assert health.flat_map.all()
  assert not health.nonfinite_gradient.any()
  counts = [str(w.message).partition(' are')[0] for w in said]
  assert counts == ['2 of 3 images (0, 2)', *['3 of 3 images (0, 1, 2)'] * 2]
  with pytest.warns(UserWarning, match='gradient that is not finite'):
    health = attacked(lambda x: jnp.sqrt(x), (seen + 1) % 5)  # X has black pixels
  assert health.nonfinite_gradient.all()
  assert not health.zero_gradient.any()


def test_it_is_not_for_traces():
  with pytest.raises(InputError, match=r'inside jax\.jit, vmap'):
    jax.jit(lambda x: adv2.attack(CLF, CAM, x, target=TARGET).x)(X)


def test_the_result_prints_in_one_line():
  result = adv2.attack(CLF, CAM, X, target=TARGET, steps=12, key=KEY)
  assert repr(result).startswith('AttackResult(3 images 16×16×3: ')
  assert len(repr(result)) < 200


def test_keys_decide_the_noise_and_the_default_is_fixed():

  def noise(params, clf, x, y, keys):
    return jax.vmap(lambda k: jax.random.uniform(k, (2, 2)))(keys), None

  interpreter = adv2.interpreters.from_map(noise)
  attack = lambda key: adv2.attack(CLF, interpreter, X, target=TARGET, steps=2, key=key).maps  # noqa: E731
  np.testing.assert_array_equal(attack(None), attack(jax.random.key(0)))
  assert np.abs(attack(jax.random.key(1)) - attack(None)).max() > 1e-3


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'x': X * 255}, 'divide 0…255 images by 255'),
    ({'x': (np.asarray(X) * 255).astype(np.uint8)}, 'images are uint8'),
    ({'x': X.at[0, 0, 0, 0].set(jnp.nan)}, 'image 0 has NaN'),
    ({'x': X[0]}, r'expected \[B,H,W,C\]: x\[None\]'),
    ({'x': jnp.moveaxis(X, -1, 1)}, 'NCHW'),
    (
      {'target': jnp.array([0, 1, 5])},
      r'target of image 2 is 5; the classifier has the classes 0…4',
    ),
    ({'target': jnp.array([0, 1, -1])}, 'target of image 2 is -1'),
    ({'target': TARGET[:2]}, r'expected \(3,\)'),
    ({'target': TARGET.astype(float)}, 'expected integers'),
    ({'label': jnp.array([0, 1, 9])}, 'label of image 2 is 9'),
    ({'target': LABEL}, 'target of image 0 is .*, its own class'),
    ({'label': TARGET}, 'target of image 0 is .*, its own class'),
    ({'target_map': np.zeros((3, 4, 4))}, r'makes maps of \(3, 8, 8\)'),
    ({'target_map': np.full((3, 8, 8), 2.0)}, r'expected finite values in \[0,1\]'),
    ({'target_map': np.full((3, 8, 8), np.nan)}, 'expected finite values'),
    ({'epsilon': 0}, 'epsilon is 0'),
    ({'epsilon': -1}, 'epsilon is -1'),
    ({'epsilon': 1.5}, 'epsilon is 1.5'),
    ({'epsilon': float('nan')}, 'epsilon is nan'),
    ({'epsilon': 8}, 'epsilon is 8; expected 0 < epsilon ≤ 1, such as 0.031'),
    ({'preset': 'quick'}, "preset 'quick' is unknown; expected one of fast, thorough, authors"),
    ({'steps': 0}, '^steps is 0; expected a whole number, 1 or more'),
    ({'steps': 2.0}, r'^steps is 2\.0; expected a whole number'),
    ({'pad_to': 2}, '^pad_to is 2; expected a whole number, 3 or more'),
    (
      {'epsilon': '8/255'},
      "epsilon is '8/255'; expected a number such as 8 / 255, or one per image",
    ),
    ({'norm': 'l2'}, "norm 'l2' without epsilon"),
    ({'norm': 'l2', 'epsilon': 1e3}, 'epsilon is 1000.0; expected 0 < epsilon ≤ 27.7, the L2 norm'),
    ({'framework': 'stadv', 'epsilon': 0.1}, 'epsilon is the radius of pgd; stadv has none'),
    ({'framework': 'cw', 'norm': 'l2'}, "norm 'l2' goes with framework 'pgd'"),
    ({'framework': 'fgsm'}, "framework is 'fgsm'; expected one of pgd, stadv, cw"),
    ({'epsilon': [0.1, 0.2]}, r'expected a number such as 8 / 255, or one per image, \[3\]'),
    ({'epsilon': np.array([0.1, 0.2, 2.0])}, 'epsilon is 2.0; expected 0 < epsilon'),
    ({'target': [None] * 3}, 'target is object; expected integers'),
    ({'goal': 'both'}, "goal is 'both'; expected one of deceive, map_only, class_only"),
    ({'target_map': 'away'}, "target_map 'away' goes with goal 'map_only', not 'deceive'"),
    ({'target_map': 'benign'}, "target_map is 'benign'; expected an array"),
    ({'goal': 'map_only', 'target': None}, "'map_only' without a target_map; expected maps"),
    ({'goal': 'map_only', 'target_map': 'away'}, 'target of image 0 is .*: with goal .map_only.'),
    ({'preset': presets.fast('cam'), 'target': None}, r'the recipe is for Goal\(.*, and goal, tar'),
    (
      {'target': None, 'interpreter': CAM.replace(classes=(0, 1))},
      'target=None, the class predicted of image 2 is 2, a class that cam never saw',
    ),
    ({'preset': presets.plain_pgd('fast', 3), 'steps': 5}, 'a recipe has its own number of steps'),
    ({'key': 0}, r'typed key such as jax\.random\.key\(0\)'),
    ({'key': jax.random.PRNGKey(0)}, 'typed key'),
    ({'key': jax.random.split(KEY, 5)}, r'key has shape \(5,\)'),
    ({'interpreter': 'cam'}, r"interpreter is 'cam'; expected an Interpreter, such as"),
    ({'interpreter': adv2.interpreters.cam}, 'is the function cam; expected an Interpreter'),
    ({'interpreter': [CAM]}, 'interpreter is a list; expected an Interpreter'),
    ({'interpreter': adv2.interpreters.grad(pool=32)}, 'pool is 32; expected 1 to 16'),
    ({'clf': lambda x: x}, 'the classifier is '),
    ({'clf': tiny.TinyNet()}, r'a Linen module, TinyNet; make a classifier of it: from_linen'),
    ({'clf': tiny.classifier(pools=False)}, r'interpreters\.grad_cam'),
  ],
)
def test_bad_input_is_told_before_any_step(changes, message, monkeypatch):
  monkeypatch.setattr(api, 'attack_batch', lambda *_, **__: pytest.fail('work was done'))
  given = {'clf': CLF, 'interpreter': CAM, 'x': X, 'target': TARGET} | changes
  with pytest.raises(InputError, match=message) as error:
    adv2.attack(given.pop('clf'), given.pop('interpreter'), given.pop('x'), **given)
  assert '\n' not in str(error.value)


NAMES = {
  *('load_classifier', 'from_linen', 'from_nnx', 'from_fn', 'check_classifier', 'Classifier'),
  *('attack', 'overlay', 'adv2', 'pgd', 'track_best', 'staged', 'run', 'run_chunk'),
  *('InputError', 'Outputs', 'Batch', 'AttackResult', 'data.load', 'images.quantise'),
  *('interpreters.cam', 'interpreters.grad', 'interpreters.grad_cam', 'interpreters.from_map'),
  *('metrics.map_l1', 'metrics.map_iou', 'metrics.spearman', 'metrics.ssim'),
  *('metrics.two_class_discrepancy', 'nets.soft_relu', 'optimisers.torch_amsgrad'),
}


def test_public_names_are_there():
  """Those that users' scripts call."""
  for name in NAMES:
    assert callable(functools.reduce(getattr, name.split('.'), adv2)), name
  fields = ('x', 'logits', 'maps', 'success', 'terms', 'history')
  assert adv2.AttackResult._fields == fields
  assert adv2.Outputs._fields == ('logits', 'taps')
