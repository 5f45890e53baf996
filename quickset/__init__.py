"""A data-only package: the image set that quickstart and the tests use. README.md says what is in it."""
