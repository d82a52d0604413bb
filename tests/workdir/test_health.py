"""What may be wrong with a run, counted from its records."""

import re

from adv2_jax.workdir import health


def test_an_example_counts_once_whatever_number_of_attacks_it_went_through():
  seen = health.Health()
  benign = [{'id': i, 'success': i == 1, 'flat_map': i == 2} for i in range(4)]
  attacked = [
    {'id': i, 'success': True, 'flat_map': i > 1, 'zero_gradient': i == 0} for i in range(4)
  ]
  assert list(seen.watch('benign', benign)) == benign
  for attack in ('pgd', 'adv2'):
    assert list(seen.watch(attack, attacked)) == attacked
  files = [f'{i}.gif' for i in range(21)]
  found = seen.found(8, 6, {'of another format': files, 'hidden': ['caf\udce9'], 'empty': []})
  assert found == {
    'zero_gradient': 1,
    'nonfinite_gradient': 0,
    'flat_maps': 2,
    'already_at_target': 1,
    'clean_accuracy': 0.75,
    'num_seen': 8,
    'files_left_out': {
      'of another format': [*files[:20], 'and 1 more'],
      'hidden': ['caf\ufffd'],
    },
  }
  lines = list(health.sentences(found))
  assert [re.search(r': (\d+) \(', line).group(1) for line in lines[:3]] == ['1', '2', '1']
  assert len(lines) == 3
  assert list(health.left_out(found))[1] == 'left out, hidden: caf\ufffd'


def test_a_sound_run_and_an_older_one_have_nothing_to_tell():
  nothing = health.Health().found(0, 0, {})
  assert nothing['clean_accuracy'] is None
  assert not list(health.sentences(nothing))
  assert not list(health.sentences({}))
