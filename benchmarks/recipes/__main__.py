"""`python -m benchmarks.recipes`."""

from benchmarks.recipes.command import main

if __name__ == "__main__":
    main()
