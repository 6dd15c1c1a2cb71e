"""Rows of the host contract: ranks."""

from rows import main

ROWS = {}

if __name__ == '__main__':
    main(ROWS)
