"""Commands: attack, evaluate, train, bench, convert."""
