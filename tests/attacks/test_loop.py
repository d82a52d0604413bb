"""The attack loop: against hand-computed steps and known optima, and that no row sees another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from adv2_jax import interpreters, losses
from adv2_jax.attacks import optimisers
from adv2_jax.attacks.loop import adv2, never, pgd, run, run_chunk, staged, success, track_best
from adv2_jax.attacks.perturbations import linf_ball
from adv2_jax.interpreters.base import Interpreter, no_map
from adv2_jax.types import Unrolled

CLF = tiny.classifier()
X = tiny.images(4)
TARGET = jnp.array([1, 2, 0, 3])
MAPS = jnp.asarray(np.random.RandomState(3).rand(4, 8, 8), jnp.float32)
BATCH = tiny.batch(X, TARGET, MAPS)
KEY = jax.random.key(7)
BALL = linf_ball(0.1)
SIGN = optax.sign_sgd(1 / 255)


def joint(clf=CLF, interpreter=None, ball=BALL, tx=SIGN, weight=10.0, **options):
  interpreter = interpreter or interpreters.cam()
  return adv2(clf, interpreter, ball, tx, weight=weight, key=KEY, **options)


@functools.cache
def program(make, steps, every):
  return jax.jit(lambda clf, batch: run(staged((make(clf), steps)), batch, every=every))


def attack_with(make, batch, steps, every=1, clf=CLF):
  """(delta, [snapshots of the stage]) of the attack `make(clf)`."""
  return program(make, steps, every)(clf, batch)


@functools.cache
def parts(make):
  attack = make(CLF)
  return tuple(jax.jit(lambda *given, f=f: f(*given)) for f in (attack.init, attack.step))


def every_step(make, batch, steps):
  """The state before each step, and after the last, and what each step saw; on the host."""
  init, step = parts(make)
  states, seen = [init(batch)], []
  for _ in range(steps):
    state, snapshot = step(batch, states[-1])
    states.append(state)
    seen.append(snapshot)
  return states, seen


def rows(batch, chosen):
  return jax.tree.map(lambda v: v[np.array(chosen)], batch)


def assert_same_steps(actual, expected):
  """Equal, but for the few pixels whose gradient is 0 to rounding, so that its sign is chance."""
  assert (np.abs(np.asarray(actual) - expected) > 1e-6).mean() < 0.002


# --- one step, and the optimum --------------------------------------------------------------------


def test_pgd_reaches_the_optimum_of_a_linear_classifier():
  """x0 + ε · sign(w_t − w_other), cut to [0,1]."""
  clf = tiny.linear_classifier(classes=2)
  batch = tiny.batch(tiny.images(3, size=4), [1, 0, 1])
  make = lambda clf: pgd(clf, linf_ball(0.1), optax.sign_sgd(0.02), key=KEY)  # noqa: E731
  delta, _ = attack_with(make, batch, 8, clf=clf)
  w = np.asarray(clf.params)
  direction = np.stack([np.sign(w[..., t] - w[..., 1 - t]) for t in (1, 0, 1)])
  best = np.clip(batch.x + 0.1 * direction, 0, 1)
  np.testing.assert_allclose(batch.x + delta, best, atol=1e-6)


def test_one_step_is_the_one_computed_by_hand():
  """x − α · sign ∇(−log p_t + λ · mean (minmax(w·A) − m_t)²), cut to the ball."""
  first = attack_with(lambda clf: joint(clf, weight=3.0), BATCH, 1)[0]

  def loss(x):
    logits, taps = CLF(x)
    raw = jnp.einsum(
      'bhwf,fb->bhw', taps['features'], CLF.params['params']['fc']['kernel'][:, TARGET]
    )
    low, high = (f(raw, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    cam = (raw - low) / (high - low)
    nll = -jax.nn.log_softmax(logits)[jnp.arange(4), TARGET]
    return (nll + 3.0 * jnp.mean((cam - MAPS) ** 2, axis=(1, 2))).sum()

  x1 = jnp.clip(X - jnp.sign(jax.jit(jax.grad(loss))(X)) / 255, 0, 1)
  assert_same_steps(X + first, x1)
  assert np.abs(first).max() > 0.9 / 255


def test_without_weight_the_joint_attack_is_pgd():
  plain, _ = attack_with(lambda clf: pgd(clf, BALL, SIGN, key=KEY), BATCH, 5)
  assert_same_steps(attack_with(lambda clf: joint(clf, weight=0.0), BATCH, 5)[0], plain)
  weighed, _ = attack_with(lambda clf: joint(clf, weight=100.0), BATCH, 5)
  assert (np.abs(weighed - plain) > 1e-6).mean() > 0.1


def test_the_total_is_weighed_by_the_schedule():
  ramp = optax.linear_schedule(5.0, 10.0, 3)
  _, (seen,) = attack_with(lambda clf: joint(clf, weight=ramp), BATCH, 5)
  np.testing.assert_array_equal(seen.step, np.arange(5))
  terms = jax.tree.map(np.float64, seen.terms)
  weight = np.array([ramp(t) for t in range(5)]).reshape(5, 1)
  np.testing.assert_allclose(terms.total, terms.prediction + weight * terms.interpretation, 1e-5)
  nll = -jax.nn.log_softmax(seen.logits)[:, jnp.arange(4), TARGET]
  np.testing.assert_allclose(terms.prediction, nll, rtol=1e-4)


def test_balance_weighs_each_example_and_is_no_loss_of_its_own():
  """λ_b = λ · balance(l_prd_b); its slope must not enter the gradient."""
  balanced = lambda clf: joint(clf, weight=2.0, balance=lambda loss: jnp.exp(-loss))  # noqa: E731
  delta, (seen,) = attack_with(balanced, BATCH, 1)
  l_prd, l_int = (np.float64(v[0]) for v in (seen.terms.prediction, seen.terms.interpretation))
  np.testing.assert_allclose(seen.terms.total[0], l_prd + 2 * np.exp(-l_prd) * l_int, rtol=1e-4)
  fixed = jnp.asarray(2 * np.exp(-l_prd), jnp.float32)
  assert_same_steps(attack_with(lambda clf: joint(clf, weight=lambda _: fixed), BATCH, 1)[0], delta)


def test_both_losses_fall():
  batch = BATCH._replace(target=jnp.argsort(tiny.outputs(CLF, X).logits)[:, -2])
  _, (seen,) = attack_with(lambda clf: joint(clf, weight=5.0), batch, 60, every=10)
  assert success(batch, jax.tree.map(lambda v: v[-1], seen)).all()
  final = jax.tree.map(lambda v: v[-1] / v[0], seen.terms)
  assert float(final.prediction.max()) < 0.9
  assert float(final.interpretation.max()) < 0.9


def test_the_penalty_is_part_of_the_loss():
  """A penalty far above the loss pulls delta to where it is least."""
  ball = BALL._replace(penalty=lambda delta: 1e4 * jnp.sum((delta - 0.02) ** 2, axis=(1, 2, 3)))
  make = lambda clf: pgd(clf, ball, optax.sign_sgd(0.005), key=KEY)  # noqa: E731
  delta, (seen,) = attack_with(make, tiny.batch(X * 0.5 + 0.2, TARGET), 4)
  np.testing.assert_allclose(delta, 0.02, atol=1e-6)
  np.testing.assert_allclose(seen.terms.penalty[0], 1e4 * 0.02**2 * 768, rtol=1e-4)


# --- rows are on their own ------------------------------------------------------------------------


def test_padding_rows_stay_bit_for_bit_and_touch_no_other():
  ball = linf_ball(0.1, random_start=True)
  make = lambda clf: track_best(joint(clf, ball=ball), prediction_score)  # noqa: E731
  is_real = jnp.array([True, False, True, False])
  strange = BATCH._replace(is_real=is_real, x=X.at[1].set(jnp.nan), target_map=MAPS.at[3].set(9))
  states, _ = every_step(make, strange, 3)
  whole, _ = every_step(make, BATCH, 3)
  ends = [make(CLF).result(b, s[-1]) for b, s in ((strange, states), (BATCH, whole))]
  for i in (1, 3):
    np.testing.assert_array_equal(ends[0][i], states[0].delta[i])
  for i in (0, 2):
    np.testing.assert_array_equal(ends[0][i], ends[1][i])
    assert (ends[1][i] != states[0].delta[i]).any()
  np.testing.assert_array_equal(states[-1].done, ~is_real)


@pytest.mark.parametrize(
  'tx', [SIGN, optimisers.torch_amsgrad(0.01), optimisers.sign_momentum(0.01)]
)
def test_an_example_does_not_see_the_others(tx):
  """Not through a reduced loss, nor through the optimiser's moments, norms or counts."""
  make = lambda clf: joint(clf, tx=tx)  # noqa: E731
  other = BATCH._replace(x=X.at[1:].set(1 - X[1:]), target=TARGET.at[1:].set(4))
  one, two = (attack_with(make, batch, 3)[0] for batch in (BATCH, other))
  np.testing.assert_array_equal(one[0], two[0])
  assert (np.abs(one[1:] - two[1:]).max((1, 2, 3)) > 1e-3).all()


def test_the_result_does_not_depend_on_how_the_set_was_cut():
  """Random starts and an interpreter's noise belong to the example's id, not to its place."""

  def weighed_by_noise(params, clf, x, y, keys):
    noise = jax.vmap(lambda k: jax.random.uniform(k, (8, 8)))(keys)
    return noise * x[:, ::2, ::2].mean(-1), None

  noisy = interpreters.from_map(weighed_by_noise)
  ball = linf_ball(0.1, random_start=True)
  make = lambda clf: joint(clf, noisy, ball)  # noqa: E731
  whole, _ = attack_with(make, BATCH, 2)
  pieces = [attack_with(make, rows(BATCH, chosen), 2)[0] for chosen in ([0, 1, 2], [3])]
  assert_same_steps(jnp.concatenate(pieces), whole)
  renamed, _ = attack_with(make, BATCH._replace(example_id=jnp.arange(4) + 1), 2)
  assert (np.abs(renamed - whole) > 1e-3).mean() > 0.5


def test_noise_is_drawn_anew_at_each_step():
  """The first step's key again would overfit the attack to one draw."""
  _, seen = every_step(lambda clf: joint(clf, KEEPER, tx=optax.sgd(0.0)), BATCH, 3)
  drawn = np.array([s.terms.interpretation for s in seen])
  assert len(np.unique(drawn)) == drawn.size


# --- interpreters with state, several maps, further losses ----------------------------------------


def keep_and_draw(params, clf, x, y, carry, keys):
  del params, clf, y
  noise = jax.vmap(lambda k: jax.random.uniform(k, (8, 8)))(keys)
  maps = jnp.broadcast_to(noise[None], (1, *noise.shape))
  return Unrolled(maps, (carry[0] + 1, carry[1] + x.mean((1, 2, 3))), jnp.zeros(len(x)), None)


# Counts its steps and sums what it has seen; its map is noise.
KEEPER = Interpreter(
  (),
  lambda *_: None,
  keep_and_draw,
  lambda p, clf, x, y, target_map, keys: (jnp.full(len(x), 10), x.mean((1, 2, 3))),
)


def stop_second(batch, snapshot):
  """Example 1 is done once step 1 has been evaluated."""
  return (batch.example_id == 1) & (snapshot.step >= 1)


def test_the_carry_goes_from_step_to_step():
  states, _ = every_step(lambda clf: joint(clf, KEEPER), BATCH, 3)
  np.testing.assert_array_equal(states[-1].carry[0], [13] * 4)
  seen = [X.mean((1, 2, 3)), *((X + s.delta).mean((1, 2, 3)) for s in states[:3])]
  np.testing.assert_allclose(states[-1].carry[1], sum(seen), rtol=1e-5)


def test_done_examples_are_held_whole():
  make = lambda clf: joint(clf, KEEPER, tx=optax.adam(0.01), stop=stop_second)  # noqa: E731
  states, _ = every_step(make, BATCH, 4)
  np.testing.assert_array_equal([s.done[1] for s in states], [False, False, True, True, True])
  assert not any(s.done[i] for s in states for i in (0, 2, 3))
  parts = [(s.delta, s.opt_state, s.carry) for s in states]
  for held, first in zip(jax.tree.leaves(parts[-1]), jax.tree.leaves(parts[1]), strict=True):
    np.testing.assert_array_equal(held[1], first[1])
    assert (held[0] != first[0]).any()
  assert states[-1].opt_state[0].count.shape == (4,)  # the optimiser's state is per example


def test_an_example_whose_gradient_is_not_finite_keeps_what_it_has():
  """Example 1 from the start, example 2 once it is bright; as a warm start left them."""

  def holed(fn):
    def call(params, x, **kwargs):
      out = fn(params, x, **kwargs)
      # The root's slope is infinite at 0: NaN for the images with a corner above a half.
      return out._replace(logits=out.logits + 0 * jnp.sqrt(jnp.maximum(0.5 - x[:, 0, 0, :1], 0)))

    return call

  corner = jnp.array([0.2, 0.7, 0.475, 0.2])
  batch = BATCH._replace(x=X.at[:, 0, 0, 0].set(corner))
  clf = CLF.replace(apply_fn=holed(CLF.apply_fn))
  brighten = optax.stateless(lambda g, _: jnp.full_like(g, 0.02))
  make = lambda clf: pgd(clf, BALL, brighten, key=KEY)  # noqa: E731
  warm = jnp.full(X.shape, 0.01)
  state = jax.jit(lambda clf: run_chunk(make(clf), batch, make(clf).init(batch, warm), 4)[0])(clf)
  np.testing.assert_array_equal(state.done, [False, True, True, False])
  np.testing.assert_array_equal(state.delta[1], warm[1])
  np.testing.assert_allclose(state.delta[2, 0, 0, 0], 0.03, atol=1e-6)  # one step, not four
  free = (batch.x[::3] + 0.09).clip(0, 1) - batch.x[::3]
  np.testing.assert_allclose(state.delta[::3], free, atol=1e-6)


def test_several_maps_and_several_interpreters():
  """The mean over the look-ahead maps, the sum over interpreters, and a loss of their own."""
  look_ahead = jnp.asarray(np.random.RandomState(0).rand(3, 4, 8, 8), jnp.float32)
  small = jnp.asarray(np.random.RandomState(1).rand(1, 4, 2, 2), jnp.float32)

  def unroll(params, clf, x, y, carry, keys):
    del params, clf, y, keys
    level = x.mean((1, 2, 3))
    scale = level.reshape(1, -1, 1, 1)
    return Unrolled({'a': look_ahead * scale, 'b': small * scale}, carry, 100 * level)

  several = Interpreter((), lambda *_: None, unroll, lambda *_: ())
  targets = {'a': MAPS, 'b': jnp.zeros((4, 2, 2))}
  delta, (seen,) = attack_with(
    lambda clf: joint(clf, several, weight=2.0), BATCH._replace(target_map=targets), 1
  )
  scale = np.float64(X.mean((1, 2, 3))).reshape(-1, 1, 1)
  expected = sum(((scale * np.float64(m) - targets['a']) ** 2).mean((1, 2)) for m in look_ahead) / 3
  expected = expected + ((scale * np.float64(small[0])) ** 2).mean((1, 2))
  np.testing.assert_allclose(seen.terms.interpretation[0], expected, rtol=1e-4)
  total = seen.terms.prediction[0] + 2 * expected + 100 * scale[:, 0, 0]
  np.testing.assert_allclose(seen.terms.total[0], total, rtol=1e-4)
  free = (X > 0.1) & (X < 0.9)
  assert (np.asarray(delta)[free] < 0).mean() > 0.9  # the extra loss pulls towards black


def test_the_classifier_runs_where_an_interpreter_gives_no_logits():
  given, (seen,) = attack_with(lambda clf: joint(clf, KEEPER), BATCH, 1)
  np.testing.assert_allclose(seen.logits[0], tiny.outputs(CLF, X).logits, rtol=1e-4, atol=1e-5)
  assert given.any()


# --- the best iterate -----------------------------------------------------------------------------


def prediction_score(batch, snapshot):
  del batch
  return snapshot.terms.prediction


# Steps so long that the loss goes up and down.
WILD = {'tx': optax.sign_sgd(0.06), 'weight': 0.0}


@pytest.mark.parametrize(
  ('every', 'stop'), [(1, never), (3, never), (1, stop_second), (3, stop_second)]
)
def test_track_best_delivers_the_best_iterate_it_has_scored(every, stop):
  """Replayed on the host; a stopped example's last iterate counts like any last iterate."""
  steps = 7
  make = lambda clf: joint(clf, **WILD, stop=stop)  # noqa: E731
  states, _ = every_step(make, BATCH, steps)
  nll = jax.jit(lambda x: losses.targeted_xent(CLF(x).logits, TARGET))
  loss = np.array([nll(BALL.apply(X, s.delta)) for s in states])
  scored = [t for t in range(steps) if (t + 1) % every == 0] + [steps]
  best = np.array(scored)[loss[scored].argmin(0)]
  assert len(set(best.tolist())) > 1  # else any fixed step would do
  delta, _ = attack_with(
    lambda clf: track_best(make(clf), prediction_score, every=every), BATCH, steps
  )
  expected = np.stack([states[t].delta[i] for i, t in enumerate(best)])
  np.testing.assert_allclose(delta, expected, atol=1e-6)


def test_a_score_that_is_not_a_number_is_never_best():
  score = lambda batch, snapshot: jnp.where(snapshot.step == 1, 0.0, jnp.nan) + batch.x[:, 0, 0, 0]  # noqa: E731
  delta, _ = attack_with(lambda clf: track_best(joint(clf, **WILD), score), BATCH, 4)
  states, _ = every_step(lambda clf: joint(clf, **WILD), BATCH, 2)
  np.testing.assert_allclose(delta, states[1].delta, atol=1e-6)


def test_the_accounts():
  """Passes of a step, plus the score's every n-th time; `result` has no backward pass."""
  spent = lambda attack: ([attack.passes(n) for n in (1, 9, 10, 25)], attack.result_passes)  # noqa: E731
  cam = joint()
  assert spent(cam) == ([2, 18, 20, 50], 0)
  assert spent(joint(interpreter=interpreters.grad())) == ([4, 36, 40, 100], 0)
  assert spent(track_best(cam, prediction_score)) == ([2, 18, 20, 50], 1)
  assert spent(track_best(cam, prediction_score, every=10, passes=3)) == ([2, 18, 23, 56], 4)


# --- loops ----------------------------------------------------------------------------------------


def test_run_and_chunks_take_the_same_steps():
  """7 steps as 3 + 3 + 1, in one program, and chunk by chunk from the host with one trace."""
  whole, (seen,) = attack_with(joint, BATCH, 7, every=3)
  np.testing.assert_array_equal(seen.step, [2, 5])
  clf, traces = tiny.counted(CLF)
  chunk = jax.jit(lambda clf, batch, state, n: run_chunk(joint(clf), batch, state, n))
  state, counts = joint().init(BATCH, None), []
  for i, n in enumerate((3, 3, 1)):
    state, snapshot = chunk(clf, BATCH, state, n)
    counts.append(len(traces))
    if i < 2:
      np.testing.assert_allclose(snapshot.logits, seen.logits[i], rtol=1e-4, atol=1e-5)
  assert_same_steps(state.delta, whole)
  assert counts[0] == counts[-1] > 0
  assert int(state.step) == 7


def test_a_stage_starts_from_what_the_one_before_delivers():
  stages = lambda *steps: jax.jit(  # noqa: E731
    lambda clf: run(staged(*((joint(clf), n) for n in steps)), BATCH, every=10)[0]
  )(CLF)
  assert_same_steps(stages(3, 2), stages(5))
  wild = lambda clf: track_best(joint(clf, **WILD), prediction_score)  # noqa: E731
  best, _ = attack_with(wild, BATCH, 5)
  two = jax.jit(lambda clf: run(staged((wild(clf), 5), (joint(clf), 0)), BATCH, every=1)[0])(CLF)
  np.testing.assert_allclose(two, best, atol=1e-6)  # the best, not the last


def test_no_map_explains_nothing_and_weighs_nothing():
  _, (seen,) = attack_with(lambda clf: joint(clf, no_map(), weight=1e6), BATCH, 1)
  assert not seen.terms.interpretation.any()
  np.testing.assert_array_equal(seen.terms.total, seen.terms.prediction)


def test_sharded_over_devices_it_takes_the_same_steps_without_communication():
  devices = jax.devices()
  assert len(devices) == 8
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ('data',), axis_types=auto, devices=devices)
  split, copied = (jax.sharding.NamedSharding(mesh, jax.P(*p)) for p in (('data',), ()))
  x = tiny.images(8)
  maps = jnp.asarray(np.random.RandomState(3).rand(8, 8, 8), jnp.float32)
  batch = tiny.batch(x, jnp.arange(8) % tiny.CLASSES, maps)

  @jax.jit
  def chunk(clf, batch, state):
    attack = track_best(joint(clf), prediction_score, every=2)
    return run_chunk(attack, batch, state, 6)[0]

  state = track_best(joint(), prediction_score, every=2).init(batch, None)
  placed = jax.tree.map(lambda v: jax.device_put(v, split if v.ndim else copied), (batch, state))
  clf = jax.device_put(CLF, copied)
  program = chunk.lower(clf, *placed).compile()
  found = program(clf, *placed)
  assert found.inner.delta.sharding.is_equivalent_to(split, 4)
  expected = chunk(CLF, batch, state)
  np.testing.assert_array_equal(found.inner.delta, expected.inner.delta)
  np.testing.assert_array_equal(found.delta, expected.delta)
  text = program.as_text()
  for word in ('all-reduce', 'all-gather', 'all-to-all', 'collective', 'reduce-scatter'):
    assert word not in text
