"""`python -m qfarm` is `qfarm`."""

from qfarm.cli import main

if __name__ == "__main__":
    main()
