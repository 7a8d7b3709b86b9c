"""`python -m triptych` and `torchrun -m triptych`: the command line."""

from triptych.apps.cli.main import main

if __name__ == "__main__":
    main()
