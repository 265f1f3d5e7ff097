"""python -m kvrag.cli."""

from kvrag.cli.program import main

if __name__ == "__main__":
    main()
