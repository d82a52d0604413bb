"""The working directory of a run: written (`store`), read back (`results`), shown (`report`)."""
