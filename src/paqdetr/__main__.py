"""`python -m paqdetr` is the program `paqdetr`."""

from paqdetr.cli import main

if __name__ == "__main__":
    main()
