"""The attack loop and what it is composed of; start with `loop`."""
