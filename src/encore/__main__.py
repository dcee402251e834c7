"""`python -m encore` is the `encore` command."""

from encore.cli import main

if __name__ == "__main__":
    main()
