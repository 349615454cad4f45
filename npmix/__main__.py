"""`python -m npmix` is the command `npmix`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="npmix")
