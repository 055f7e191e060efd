"""`python -m dmquant` is the `dmquant` command; `accelerate launch -m dmquant` has processes share its work."""

from dmquant.host import processes
from dmquant.pipelines.commands.app import main

if __name__ == "__main__":
    with processes.joined():
        main()
