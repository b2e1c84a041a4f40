"""``python -m curation.cli``."""

from curation.cli import entry

if __name__ == "__main__":  # worker processes import this module under another name
    entry()
