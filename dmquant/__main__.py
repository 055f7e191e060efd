"""`python -m dmquant` is the `dmquant` command."""

from dmquant.cli import main

if __name__ == "__main__":
    main()
